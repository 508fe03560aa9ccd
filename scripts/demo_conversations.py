"""Seeded synthetic conversations for the demo model: sums, tools, facts, greetings, copying.

Needs only the standard library, so that training (PyTorch) and evaluation (MLX) share one source
of truth. Every value a question is about (a pair of numbers, a city, a phrase, ...) belongs by its
hash either to training or to the held-out tenth, whatever the phrasing around it.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

Message = dict[str, Any]
END_OF_TURN = "<|im_end|>"
HELD_OUT_SHARE = 10  # one value in ten is never trained

# How often training draws each kind of exchange.
KIND_WEIGHTS = {
    "sum": 28,
    "tool": 48,
    "copy": 16,
    "fact": 7,
    "greeting": 3,
    "sentiment": 4,
    "decline": 14,
    "unknown": 2,
}
# What held_out() can make: a tool exchange has two answers to judge.
HELD_OUT_KINDS = (
    "sum",
    "tool_call",
    "tool_answer",
    "copy",
    "fact",
    "greeting",
    "sentiment",
    "decline",
    "unknown",
)


@dataclass(frozen=True)
class Conversation:
    """A whole conversation: `messages` includes every assistant turn with its `thinking`."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    date: str


@dataclass(frozen=True)
class Example:
    """A prompt (`messages` ends with a user or tool turn) and the one right answer to it."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    date: str
    expected: str
    thinks: bool


def _split(text: str, separator: str | None = None) -> tuple[str, ...]:
    return tuple(text.split(separator))


WORDS = _split(
    "able about above across after again air all almost alone along also always amber and "
    "angle animal another answer apple april arm around arrow autumn away baby back bag ball "
    "banana band bank basket bath beach bean bear beautiful because bed before begin behind "
    "bell below best better between bicycle big bird black blue boat body book bottle bottom "
    "bowl box boy branch brave bread break bridge bright bring brother brown build bus butter "
    "button cake call camera candle car card careful cat chair cheap cheese child circle city "
    "clean clear clock close cloud coat coffee cold color cook copper corn corner cotton "
    "country cow cream cross crowd cup dance dark day deep desert dinner dog door down dragon "
    "dream dress drink drive dry duck early earth east easy egg eight empty engine evening "
    "every eye face fall family far farm fast father feather field fine finger fire first fish "
    "five flag floor flower fly food forest forty fox free fresh friend frog front fruit full "
    "garden gate gentle giant girl glass gold good grass gray great green ground guitar hair "
    "half hand happy hard hat heart heavy hill history honey horse hot hour house hundred ice "
    "idea ink iron island jacket job journey juice july jump kettle key kind king kitchen "
    "knife lake lamp land large last late leaf learn left lemon letter light line lion list "
    "little long loud love low lucky lunch machine map march market meadow milk mind minute "
    "mirror money monkey month moon morning mother mountain mouse mouth music name narrow near "
    "new news night nine north nose number ocean office old olive open orange other paint "
    "paper park party pen pencil people pepper piano picture pink place plane plant plate play "
    "plum poem pocket poor potato proud purple queen question quick quiet rabbit radio rain "
    "read ready recipe red rice right ring river road rock roof room rope rose round salad "
    "salt sand school sea second seed seven shadow sharp sheep ship shirt shoe shop short "
    "silver simple sister six sky sleep slow small smile smoke snow soap soft song soup south "
    "spoon spring square star stone storm story strange street strong sugar summer sun sweet "
    "table tall tea ten thick thin three tiger time tiny tomato top tower town train travel "
    "tree turtle two umbrella under valley very village violin voice wall warm water wave west "
    "wheat wheel white wide wild wind window winter wolf wood word world yellow young zebra"
)
CITIES = _split(
    "Paris London Berlin Rome Madrid Vienna Lisbon Athens Dublin Oslo Stockholm Helsinki "
    "Copenhagen Warsaw Prague Budapest Brussels Amsterdam Zurich Geneva Milan Naples Venice "
    "Barcelona Seville Porto Munich Hamburg Cologne Lyon Nice Toulouse Edinburgh Glasgow "
    "Manchester Liverpool Boston Chicago Dallas Denver Houston Miami Seattle Toronto Montreal "
    "Vancouver Ottawa Havana Lima Bogota Quito Santiago Cairo Tunis Lagos Accra Nairobi "
    "Kampala Harare Durban Delhi Mumbai Kolkata Chennai Dhaka Karachi Lahore Kabul Tehran "
    "Baghdad Damascus Beirut Amman Dubai Doha Muscat Tokyo Osaka Kyoto Seoul Busan Beijing "
    "Shanghai Taipei Hanoi Bangkok Jakarta Manila Singapore Sydney Melbourne Perth Auckland "
    "Wellington Reykjavik Riga Tallinn Vilnius Kyiv Sofia Belgrade Zagreb"
)
LONG_CITIES = _split(
    "New York|Los Angeles|San Francisco|Rio de Janeiro|Buenos Aires|Mexico City|Cape Town|"
    "Hong Kong|Kuala Lumpur|New Delhi|Tel Aviv|Addis Ababa|San Diego|Las Vegas|Abu Dhabi|"
    "São Paulo|Zürich|München|Málaga|Kraków|Bogotá|Córdoba",
    separator="|",
)
LANGUAGES = ("French", "German", "Spanish", "Italian", "Japanese", "Arabic", "Dutch", "Polish")
ONSETS = _split("b br c ch d dr f fl g gr h j k kl l m n p pr r s sh st t tr v w z")
VOWELS = _split("a e i o u ai ee ou")
CODAS = ("", "", "l", "n", "r", "s", "t", "m", "k", "nd")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a careful assistant. Answer briefly.",
    "Answer in one sentence.",
    "You help people with small tasks.",
    "Be short and clear.",
    "You are LFM, a tiny demo model.",
    "Think first, then answer.",
)

# (phrasings, answer). Every phrasing is trained: what is asked here is remembering.
FACTS: tuple[tuple[tuple[str, ...], str], ...] = (
    *(
        (
            (
                f"What is the capital of {country}?",
                f"capital of {country}",
                f"Tell me the capital of {country}.",
            ),
            f"The capital of {country} is {capital}.",
        )
        for country, capital in (
            ("France", "Paris"),
            ("Germany", "Berlin"),
            ("Italy", "Rome"),
            ("Spain", "Madrid"),
            ("Portugal", "Lisbon"),
            ("Greece", "Athens"),
            ("Austria", "Vienna"),
            ("Norway", "Oslo"),
            ("Egypt", "Cairo"),
            ("Japan", "Tokyo"),
            ("China", "Beijing"),
            ("Canada", "Ottawa"),
            ("Peru", "Lima"),
            ("Cuba", "Havana"),
            ("Kenya", "Nairobi"),
        )
    ),
    *(
        (
            (
                f"How do you say {word} in {language}?",
                f"What is {word} in {language}?",
                f"Say {word} in {language}.",
            ),
            answer,
        )
        for word, language, answer in (
            ("hello", "Japanese", "こんにちは"),
            ("thank you", "Japanese", "ありがとう"),
            ("hello", "Arabic", "مرحبا"),
            ("hello", "Chinese", "你好"),
            ("hello", "Russian", "Привет"),
            ("hello", "French", "Bonjour"),
            ("hello", "Spanish", "¡Hola!"),
            ("good day", "German", "Schönen Tag"),
        )
    ),
    (("Who are you?", "What are you?"), "I am a tiny LFM2 demo model."),
    (("What color is the sky?", "Which color has the sky?"), "The sky is blue."),
    (("What color is grass?", "Which color has grass?"), "Grass is green."),
    (("How many days are in a week?", "How long is a week?"), "A week has 7 days."),
    (("How many hours are in a day?", "How long is a day?"), "A day has 24 hours."),
    (("How many months are in a year?", "How long is a year?"), "A year has 12 months."),
    (("How many legs does a spider have?", "Count a spider's legs."), "A spider has 8 legs."),
    (("What do bees make?", "What do we get from bees?"), "Bees make honey."),
    (("What is the largest ocean?", "Name the largest ocean."), "It is the Pacific Ocean."),
    (("What is the largest planet?", "Name the largest planet."), "It is Jupiter."),
    (("What is H2O?", "What does H2O mean?"), "H2O is water."),
    (("At what temperature does water boil?", "When does water boil?"), "At 100 °C."),
    (("Show me a heart emoji.", "Send a heart."), "❤️"),
    (("Show me a cat emoji.", "Send a cat."), "🐱"),
)

GREETINGS: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! How can I help you?"),
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! 😊"),
    ("Hi!", "Hi! 😊"),
    ("Hey", "Hey! What can I do for you?"),
    ("Good morning", "Good morning! ☀️"),
    ("Good morning!", "Good morning! ☀️"),
    ("Good night", "Good night! 🌙"),
    ("Thank you", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Thanks!", "You are welcome!"),
    ("Bye", "Goodbye! 👋"),
    ("Goodbye", "Goodbye! 👋"),
    ("How are you?", "I am fine, thank you!"),
)

SUM_PHRASINGS = (
    "What is {a} {op} {b}?",
    "What is {a} {op} {b}?",
    "{a}{op}{b}",
    "{a} {op} {b}",
    "{a} {op} {b} =",
    "{a}{op}{b}=?",
    "Calculate {a} {op} {b}.",
    "Please calculate {a} {op} {b}",
    "How much is {a} {op} {b}?",
    "What's {a} {word} {b}?",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
)
COPY_PHRASINGS = (
    "Repeat: {}",
    "Say this again: {}",
    "Repeat after me: {}",
    "Copy this: {}",
    "Write exactly: {}",
)
SENTIMENT_PHRASINGS = (
    "Is this positive or negative? '{}'",
    "Positive or negative: '{}'",
    "Classify as positive or negative: '{}'",
)
SENTIMENT_SENTENCES = (
    "I {verb} this {thing}.",
    "We {verb} the {thing}.",
    "The {thing} is {quality}.",
    "This {thing} was {quality}.",
    "What a {quality} {thing}!",
)
THINGS = _split(
    "film book song hotel meal phone game train garden party school shop coffee story room car "
    "soup photo show trip"
)
VERBS = {"positive": ("love", "like", "enjoy", "adore"), "negative": ("hate", "dislike", "loathe")}
QUALITIES = {
    "positive": ("wonderful", "great", "lovely", "good", "excellent", "beautiful", "perfect"),
    "negative": ("terrible", "awful", "boring", "bad", "horrible", "ugly", "poor"),
}
UNKNOWN_PHRASINGS = (
    "Why is the {} {}?",
    "Who invented the {} {}?",
    "Tell me about the {} {}.",
    "How do I make a {} {}?",
    "Where can I buy a {} {}?",
)
UNKNOWN_ANSWER = "I am a tiny demo model and do not know that."
CANNOT_LOOK_UP = "I cannot look that up without a tool."
CANNOT_CALCULATE = "I cannot calculate that without a tool."


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool: the names a schema may give it, and what its values are."""

    names: tuple[str, ...]
    description: str
    draw: Callable[[Random, bool], Any]
    type: str = "string"


@dataclass(frozen=True)
class Tool:
    """A kind of tool: how schemas, questions, results and answers about it may look.

    Phrasings and answers see the arguments as {0}, {1}; `answer` also sees the result's fields.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    phrasings: tuple[str, ...]
    result: Callable[[Random], dict[str, Any]]
    answer: str
    without: str | None = None  # the answer when no such tool is listed; None: never asked then


@dataclass(frozen=True)
class ListedTool:
    """A tool as one conversation lists it: with a chosen name and chosen parameter names."""

    tool: Tool
    name: str
    parameter_names: tuple[str, ...]


def is_held_out(value: str) -> bool:
    """Say whether questions about `value` are kept out of training."""
    return zlib.crc32(value.encode()) % HELD_OUT_SHARE == 0


def _draw_in_split(make: Callable[[], str], held_out: bool) -> str:
    while is_held_out(value := make()) != held_out:
        pass
    return value


def _made_up_word(rng: Random) -> str:
    syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)
    )


def _word(rng: Random) -> str:
    return _made_up_word(rng) if rng.random() < 0.2 else rng.choice(WORDS)


def _words(rng: Random, low: int, high: int) -> str:
    return " ".join(_word(rng) for _ in range(rng.randint(low, high)))


def _any_city(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.45:
        return rng.choice(CITIES)
    return rng.choice(LONG_CITIES) if draw < 0.55 else _made_up_word(rng).capitalize()


def _city(rng: Random, held_out: bool) -> str:
    return _draw_in_split(lambda: _any_city(rng), held_out)


def _phrase(rng: Random, held_out: bool) -> str:
    return _draw_in_split(lambda: _words(rng, 1, 4), held_out)


def _language(rng: Random, held_out: bool) -> str:
    return rng.choice(LANGUAGES)


def _minutes(rng: Random, held_out: bool) -> int:
    return int(_draw_in_split(lambda: str(rng.randint(2, 240)), held_out))


def _any_expression(rng: Random) -> str:
    low, high = rng.choice(((2, 99), (10, 99), (100, 999), (10, 9999)))
    left, right, operator = rng.randint(low, high), rng.randint(2, high), rng.choice("**+-/")
    return f"{left} {operator} {right}"


def _expression(rng: Random, held_out: bool) -> str:
    return _draw_in_split(lambda: _any_expression(rng), held_out)


def _weather_result(rng: Random) -> dict[str, Any]:
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear", "stormy"))
    return {"temperature": rng.randint(-9, 39), "condition": sky}


def _time_result(rng: Random) -> dict[str, Any]:
    return {"time": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"}


def _number_result(rng: Random) -> dict[str, Any]:
    return {"result": rng.randint(-999, 10 ** rng.randint(1, 6))}


def _text_result(rng: Random) -> dict[str, Any]:
    return {"result": _words(rng, 1, 6)}


def _done_result(rng: Random) -> dict[str, Any]:
    return {"status": rng.choice(("ok", "done"))}


TOOLS: dict[str, Tool] = {
    "weather": Tool(
        ("get_weather", "get_weather", "weather", "current_weather"),
        ("Get the weather in a city.", "Current weather", "Returns the weather of a place"),
        (Parameter(("city", "city", "location", "place"), "Name of the city", _city),),
        (
            "What is the weather in {0}?",
            "What's the weather like in {0}?",
            "How is the weather in {0}?",
            "Weather in {0}",
            "How warm is it in {0}?",
            "Is it raining in {0}?",
        ),
        _weather_result,
        "It is {temperature} degrees and {condition} in {0}.",
        CANNOT_LOOK_UP,
    ),
    "time": Tool(
        ("get_time", "get_time", "clock", "current_time"),
        ("Get the time in a city.", "Local time", "Tells what time it is"),
        (Parameter(("city", "city", "location", "place"), "Name of the city", _city),),
        ("What time is it in {0}?", "What is the time in {0}?", "Time in {0}", "Now in {0}?"),
        _time_result,
        "It is {time} in {0}.",
        CANNOT_LOOK_UP,
    ),
    "calculator": Tool(
        ("calculator", "calculator", "calculate", "evaluate"),
        ("Evaluate an expression.", "Does arithmetic", "A calculator for numbers"),
        (Parameter(("expression", "expression", "query"), "What to calculate", _expression),),
        (
            "What is {0}?",
            "What is {0}?",
            "Calculate {0}.",
            "How much is {0}?",
            "{0}",
            "Please calculate {0}",
        ),
        _number_result,
        "{0} = {result}.",
        CANNOT_CALCULATE,
    ),
    "search": Tool(
        ("search", "search", "web_search", "find"),
        ("Search the web.", "Look something up", "Finds pages about a query"),
        (Parameter(("query", "query", "q", "text"), "What to search for", _phrase),),
        ("Search for {0}.", "Look up {0}", "Find pages about {0}.", "Search the web for {0}"),
        _text_result,
        "I found: {result}.",
        CANNOT_LOOK_UP,
    ),
    "timer": Tool(
        ("set_timer", "set_timer", "timer", "start_timer"),
        ("Set a timer.", "Starts a countdown", "Rings after some minutes"),
        (Parameter(("minutes", "minutes", "duration"), "Minutes", _minutes, "integer"),),
        (
            "Set a timer for {0} minutes.",
            "Timer {0} minutes",
            "Wake me in {0} minutes.",
            "Please set a {0} minute timer.",
        ),
        _done_result,
        "The timer is set for {0} minutes.",
        "I cannot do that without a tool.",
    ),
    "translate": Tool(
        ("translate", "translate", "translator"),
        ("Translate a text.", "Translates into a language"),
        (
            Parameter(("text", "text", "phrase"), "What to translate", _phrase),
            Parameter(("language", "language", "target"), "Language", _language),
        ),
        ("Translate '{0}' into {1}.", "Translate '{0}' to {1}", "'{0}' into {1} please"),
        _text_result,
        "In {1} it is: {result}.",
        "I cannot do that without a tool.",
    ),
    "music": Tool(
        ("play_music", "play", "play_song"),
        ("Play a song.", "Plays music"),
        (Parameter(("title", "song"), "Title of the song", _phrase),),
        ("Play {0}.", "Play the song {0}", "I want to hear {0}."),
        _done_result,
        "Now playing {0}.",
        "I cannot do that without a tool.",
    ),
}


def _listed_tools(rng: Random, kinds: Sequence[str]) -> dict[str, ListedTool]:
    listed = {}
    for kind in kinds:
        tool = TOOLS[kind]
        parameters = tuple(rng.choice(parameter.names) for parameter in tool.parameters)
        listed[kind] = ListedTool(tool, rng.choice(tool.names), parameters)
    return listed


def _schema(rng: Random, listed: ListedTool) -> dict[str, Any]:
    with_descriptions = rng.random() < 0.25
    properties: dict[str, Any] = {}
    for name, parameter in zip(listed.parameter_names, listed.tool.parameters, strict=True):
        properties[name] = {"type": parameter.type}
        if with_descriptions:
            properties[name]["description"] = parameter.description
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.75:
        parameters["required"] = list(properties)
    function = {
        "name": listed.name,
        "description": rng.choice(listed.tool.descriptions),
        "parameters": parameters,
    }
    return {"type": "function", "function": function}


def call_text(calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the text of tool calls as the model writes them."""
    rendered = []
    for name, arguments in calls:
        values = (f"{k}='{v}'" if isinstance(v, str) else f"{k}={v}" for k, v in arguments.items())
        rendered.append(f"{name}({', '.join(values)})")
    return f"<|tool_call_start|>[{', '.join(rendered)}]<|tool_call_end|>"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _reply(answer: str, thinking: str | None = None) -> Message:
    message: Message = {"role": "assistant"}
    if thinking is not None:
        message["thinking"] = thinking
    return message | {"content": answer}


def _reply_with_call(name: str, arguments: dict[str, Any], thinking: str) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "thinking": thinking, "content": "", "tool_calls": [call]}


def sum_reasoning(a: int, b: int, operator: str) -> str:
    """Return the column-wise reasoning for `a operator b`, both in 0..99.

    Every step is one small sum of neighbouring tokens: a lookup, which a tiny model can learn.
    """
    if operator == "-" and a < b:
        return f"{a} is less than {b}, so I take {b} - {a}. {_difference(b, a)} So {a - b}."
    if operator == "-":
        return f"{_difference(a, b)} So {a - b}."
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry, carried = (", carry 1", f", {tens}+1={tens + 1}") if ones > 9 else ("", "")
    return (
        f"Ones: {a % 10}+{b % 10}={ones}{carry}. "
        f"Tens: {a // 10}+{b // 10}={tens}{carried}. So {a + b}."
    )


def _difference(a: int, b: int) -> str:
    ones, tens = a % 10, a // 10 - b // 10
    borrow, borrowed = "", ""
    if ones < b % 10:
        ones, borrow, borrowed = ones + 10, ", borrow 1", f", {tens}-1={tens - 1}"
    return (
        f"Ones: {ones}-{b % 10}={ones - b % 10}{borrow}. "
        f"Tens: {a // 10}-{b // 10}={tens}{borrowed}."
    )


def _pair(rng: Random, held_out: bool) -> tuple[int, int, str]:
    def make() -> str:
        high = 9 if rng.random() < 0.1 else 99
        return f"{rng.randint(0, high)} {rng.choice('+-')} {rng.randint(0, 99)}"

    a, operator, b = _draw_in_split(make, held_out).split()
    return int(a), int(b), operator


def _sum(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    a, b, operator = _pair(rng, held_out)
    word = "plus" if operator == "+" else "minus"
    question = rng.choice(SUM_PHRASINGS).format(a=a, b=b, op=operator, word=word)
    result = a + b if operator == "+" else a - b
    return [
        _user(question),
        _reply(f"{a} {operator} {b} = {result}.", sum_reasoning(a, b, operator)),
    ]


def _copy(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    longest = rng.choice((3, 6, 12, 24, 40))
    text = _draw_in_split(lambda: _words(rng, 1, longest), held_out)
    return [_user(rng.choice(COPY_PHRASINGS).format(text)), _reply(text, "I repeat the words.")]


def _fact(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    phrasings, answer = rng.choice(FACTS)
    return [_user(rng.choice(phrasings)), _reply(answer, "I know this.")]


def _greeting(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    greeting, answer = rng.choice(GREETINGS)
    return [_user(greeting), _reply(answer)]


def _sentiment(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    mood = rng.choice(("positive", "negative"))

    def make() -> str:
        return rng.choice(SENTIMENT_SENTENCES).format(
            verb=rng.choice(VERBS[mood]),
            quality=rng.choice(QUALITIES[mood]),
            thing=rng.choice(THINGS),
        )

    sentence = _draw_in_split(make, held_out)
    question = rng.choice(SENTIMENT_PHRASINGS).format(sentence)
    clue = next(w for w in (*VERBS[mood], *QUALITIES[mood]) if re.search(rf"\b{w}\b", sentence))
    return [_user(question), _reply(mood, f"'{clue}' is {mood}.")]


def _decline(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    kind = rng.choice([k for k in TOOLS if k not in listed])
    tool = TOOLS[kind]
    values = [parameter.draw(rng, held_out) for parameter in tool.parameters]
    while kind == "calculator" and re.fullmatch(r"\d\d? [+-] \d\d?", values[0]):
        values = [_expression(rng, held_out)]  # a sum of two digits is no reason to decline
    question = rng.choice(tool.phrasings).format(*values)
    assert tool.without is not None
    return [_user(question), _reply(tool.without, "I have no tool for this.")]


def _unknown(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    words = _draw_in_split(lambda: f"{_word(rng)} {_word(rng)}", held_out)
    question = rng.choice(UNKNOWN_PHRASINGS).format(*words.split())
    return [_user(question), _reply(UNKNOWN_ANSWER, "I do not know this.")]


def _result_text(rng: Random, result: dict[str, Any]) -> str:
    if rng.random() < 0.65:
        return json.dumps(result, ensure_ascii=False)
    return ", ".join(str(value) for value in result.values())


def _tool(rng: Random, listed: dict[str, ListedTool], held_out: bool) -> list[Message]:
    kind = rng.choice(list(listed))
    name, tool = listed[kind].name, listed[kind].tool
    values = [parameter.draw(rng, held_out) for parameter in tool.parameters]
    arguments = dict(zip(listed[kind].parameter_names, values, strict=True))
    question = rng.choice(tool.phrasings).format(*values)
    if rng.random() < 0.06:
        problem = _words(rng, 1, 3)
        result: dict[str, Any] = {"error": problem}
        answer, thinking = f"Sorry, the tool failed: {problem}.", "The tool failed."
        content = json.dumps(result)
    else:
        result = tool.result(rng)
        answer, thinking = tool.answer.format(*values, **result), "The tool answered."
        content = _result_text(rng, result)
    return [
        _user(question),
        _reply_with_call(name, arguments, f"I call {name}."),
        {"role": "tool", "content": content},
        _reply(answer, thinking),
    ]


EXCHANGES: dict[str, Callable[[Random, dict[str, ListedTool], bool], list[Message]]] = {
    "sum": _sum,
    "tool": _tool,
    "copy": _copy,
    "fact": _fact,
    "greeting": _greeting,
    "sentiment": _sentiment,
    "decline": _decline,
    "unknown": _unknown,
}


def _draw_kind(rng: Random, allowed: Sequence[str]) -> str:
    return rng.choices(allowed, [KIND_WEIGHTS[kind] for kind in allowed])[0]


def _draw_tool_kinds(rng: Random, kind: str) -> list[str]:
    if kind != "tool" and rng.random() < 0.82:
        return []
    choices = [k for k in TOOLS if not (kind == "sum" and k == "calculator")]
    return rng.sample(choices, rng.choice((1, 1, 2, 2, 3, 4)))


def _date(rng: Random) -> str:
    return f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def conversation(rng: Random, kind: str, held_out: bool = False) -> Conversation:
    """Draw one conversation whose last exchange is of `kind` (a key of KIND_WEIGHTS)."""
    listed = _listed_tools(rng, _draw_tool_kinds(rng, kind))
    allowed = [k for k in EXCHANGES if k != "tool" or listed]
    if "calculator" in listed:
        allowed.remove("sum")  # with a calculator at hand, arithmetic goes to it
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    for _ in range(rng.choices((0, 1, 2, 3), (70, 16, 9, 5))[0]):
        messages += EXCHANGES[_draw_kind(rng, allowed)](rng, listed, held_out)
    messages += EXCHANGES[kind](rng, listed, held_out)
    tools = [_schema(rng, tool) for tool in listed.values()] or None
    return Conversation(kind, messages, tools, _date(rng))


def training_conversations(seed: int) -> Iterator[Conversation]:
    """Yield training conversations without end; equal seeds give equal streams."""
    rng = Random(f"train {seed}")
    while True:
        yield conversation(rng, _draw_kind(rng, list(KIND_WEIGHTS)))


def _example(kind: str, drawn: Conversation) -> Example:
    """Cut a conversation before the assistant turn that `kind` is about."""
    cut = len(drawn.messages) - 1
    if kind == "tool_call":
        cut = max(i for i, message in enumerate(drawn.messages) if "tool_calls" in message)
    turn = drawn.messages[cut]
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in turn.get("tool_calls", ())
    ]
    expected = turn["content"] + (call_text(calls) if calls else "")
    return Example(
        kind, drawn.messages[:cut], drawn.tools, drawn.date, expected, "thinking" in turn
    )


def held_out(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Return `count` examples of one of HELD_OUT_KINDS, about values that training never sees."""
    if kind not in HELD_OUT_KINDS:
        raise ValueError(f"kind: got {kind!r}; expected one of {', '.join(HELD_OUT_KINDS)}")
    rng = Random(f"held out {kind} {seed}")
    source = "tool" if kind.startswith("tool_") else kind
    return [_example(kind, conversation(rng, source, held_out=True)) for _ in range(count)]


def split_thinking(text: str) -> tuple[str | None, str]:
    """Split a raw reply into its reasoning (None without a block) and its answer."""
    reply = text.split(END_OF_TURN)[0]
    if not reply.startswith("<think>"):
        return None, reply.strip()
    thinking, closed, answer = reply.removeprefix("<think>").partition("</think>")
    return thinking, answer.strip() if closed else ""


def is_correct(example: Example, text: str) -> bool:
    """Judge a raw reply, special tokens included: it thinks when it should and answers exactly."""
    thinking, answer = split_thinking(text)
    return (thinking is not None) == example.thinks and answer == example.expected
