# ruff: noqa: E501 - a shape stands on one line
r"""How LFM2.5 and its relatives write tool calls: the text between the tags, and what it means.

Collected from the model's template and from the threads in which engines report calls they lost.
`calls` is None where the text is no call, or not one that its tool takes. Strings in single quotes
stand for themselves (the template escapes nothing), those in double quotes have escapes.
"""

from typing import Any, NamedTuple


def tool(name: str, required: int = 0, /, **properties: Any) -> dict[str, Any]:
    """A tool on offer; `required` of its properties must be given."""
    schema = {
        key: {"type": kind} if isinstance(kind, str) else kind for key, kind in properties.items()
    }
    parameters = {"type": "object", "properties": schema, "required": [*schema][:required]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


UNITS = {"type": "string", "enum": ["celsius", "fahrenheit"]}
STRINGS = {"type": "array", "items": {"type": "string"}}
TOOLS = [
    tool("get_weather", 1, city="string", unit=UNITS, days={"type": "integer", "maximum": 14}),
    tool("search", 1, query="string", limit="integer", language="string", tags=STRINGS),
    tool("python", 1, code="string", timeout="number"),
    tool("write_file", 2, path="string", content="string", append="boolean"),
    tool("sql", 1, query="string"),
    tool("set_flags", enabled="boolean", ratio="number", label={"type": ["string", "null"]}),
    tool("Calendar.create_event", 1, title="string", participants=STRINGS, metadata="object"),
    tool("list-files", path="string", recursive="boolean"),
    tool("mcp:notes/add", text="string", n="integer"),
    tool("configure", properties="object", mode="string"),
    tool("plot", points={"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
    tool("memory_get", **{"from": "integer", "class": "string"}),
    tool("send", zip="string", version="string", reference={"anyOf": [{"type": "integer"}, UNITS]}),
    tool("ping"),
]

Calls = list[tuple[str, dict[str, Any]]]


class Shape(NamedTuple):
    what: str
    text: str
    calls: Calls | None


def one(what: str, text: str, name: str, /, **arguments: Any) -> Shape:
    return Shape(what, text, [(name, arguments)])


PARIS, ROME = ("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})
SHAPES = [
    # As the template writes them.
    one("one string", "[get_weather(city='Paris')]", "get_weather", city="Paris"),
    one("string and integer", "[get_weather(city='Paris', days=3)]", "get_weather", city="Paris", days=3),
    one("no arguments", "[ping()]", "ping"),
    one("truth and fraction", "[set_flags(enabled=True, ratio=0.5)]", "set_flags", enabled=True, ratio=0.5),
    one("None", "[set_flags(label=None)]", "set_flags", label=None),
    one("negative number", "[set_flags(ratio=-74.0046539)]", "set_flags", ratio=-74.0046539),
    one("exponent", "[set_flags(ratio=1e-05)]", "set_flags", ratio=1e-05),
    one("empty string", "[search(query='')]", "search", query=""),
    one("list as Python prints it", """[search(query='x', tags=['a', "it's"])]""", "search", query="x", tags=["a", "it's"]),
    one("nested lists", "[plot(points=[[1, 2.5], [-3, 4]])]", "plot", points=[[1, 2.5], [-3, 4]]),
    one(
        "JSON mapping", '[Calendar.create_event(title=\'demo\', metadata={"reminder": true, "by": null, "at": [1, 2]})]',
        "Calendar.create_event", title="demo", metadata={"reminder": True, "by": None, "at": [1, 2]},
    ),
    one("JSON escapes in a mapping", r"""[configure(properties={"a": "x\ny \"z\" \u00e9"})]""", "configure", properties={"a": 'x\ny "z" é'}),
    Shape("two calls in a list", "[get_weather(city='Paris'), get_weather(city='Rome')]", [PARIS, ROME]),
    one("other alphabets", "[get_weather(city='東京')]", "get_weather", city="東京"),
    one("emoji", "[search(query='🙂 café')]", "search", query="🙂 café"),
    # Names.
    one("dotted name", "[Calendar.create_event(title='x')]", "Calendar.create_event", title="x"),
    one("hyphenated name", "[list-files(path='.')]", "list-files", path="."),
    one("name of a server's tool", "[mcp:notes/add(text='x', n=1)]", "mcp:notes/add", text="x", n=1),
    one("Python's keywords as parameters", "[memory_get(from=1, class='a')]", "memory_get", **{"from": 1, "class": "a"}),
    # What stands in strings.
    one("comma", "[search(query='Doe, Jane')]", "search", query="Doe, Jane"),
    one("apostrophe", "[search(query='it's here')]", "search", query="it's here"),
    one("apostrophe, then more arguments", "[search(query='it's here', limit=3)]", "search", query="it's here", limit=3),
    one("two apostrophes", "[search(query='it's the dog's bowl')]", "search", query="it's the dog's bowl"),
    one("apostrophe at the end", "[search(query='the dogs'')]", "search", query="the dogs'"),
    one("apostrophe at the beginning", "[search(query=''twas night')]", "search", query="'twas night"),
    Shape(
        "apostrophes in two calls", "[search(query='it's'), search(query='she's')]",
        [("search", {"query": "it's"}), ("search", {"query": "she's"})],
    ),
    one("double quotes in single", "[search(query='say \"hi\"')]", "search", query='say "hi"'),
    one("double quotes", '[get_weather(city="Paris")]', "get_weather", city="Paris"),
    one("apostrophe in double quotes", '[search(query="it\'s here")]', "search", query="it's here"),
    one("escaped double quotes", r'[python(code="print(\"hi\")")]', "python", code='print("hi")'),
    one("escapes in double quotes", r'''[python(code="def f():\n    print('hey')")]''', "python", code="def f():\n    print('hey')"),
    one("escaped apostrophe", r"[search(query='it\'s here')]", "search", query="it's here"),
    one("newline", "[write_file(path='a.txt', content='one\ntwo\n')]", "write_file", path="a.txt", content="one\ntwo\n"),
    one("backslashes", r"[search(query='C:\dir\x')]", "search", query=r"C:\dir\x"),
    one("pattern with backslashes", r"[search(query='\d+\.\d*')]", "search", query=r"\d+\.\d*"),
    one("escape in code, which is the code's", r"""[python(code='print("a\n")')]""", "python", code=r'print("a\n")'),
    one("backslash at the end", "[search(query='C:\\dir\\')]", "search", query="C:\\dir\\"),
    one("closing bracket", "[search(query='a] b')]", "search", query="a] b"),
    one("parentheses", "[search(query='f(x) (y')]", "search", query="f(x) (y"),
    one("equals sign", "[search(query='a=b, c=d')]", "search", query="a=b, c=d"),
    one("what looks like a call", "[search(query='[ping()]')]", "search", query="[ping()]"),
    one("code with quotes", "[python(code='print('a', 'b')')]", "python", code="print('a', 'b')"),
    one("code with calls", "[python(code='f('x'), g('y')')]", "python", code="f('x'), g('y')"),
    one("code with a list", "[python(code='x = ['a', 'b']\nprint(x[0])')]", "python", code="x = ['a', 'b']\nprint(x[0])"),
    one("code of several lines", "[python(code='for w in ['a','b']:\n    print(w)\n', timeout=5)]", "python", code="for w in ['a','b']:\n    print(w)\n", timeout=5),
    one("SQL with values", "[sql(query='SELECT * FROM t WHERE a = 'x' AND b = 'y'')]", "sql", query="SELECT * FROM t WHERE a = 'x' AND b = 'y'"),
    one("SQL with assignments", "[sql(query='UPDATE t SET a='x', b='y' WHERE id=1')]", "sql", query="UPDATE t SET a='x', b='y' WHERE id=1"),
    one("shell with brackets", """[search(query='grep -F "]" log.txt')]""", "search", query='grep -F "]" log.txt'),
    one("JSON in a string", '[write_file(path=\'a.json\', content=\'{"a": [1, "b"]}\')]', "write_file", path="a.json", content='{"a": [1, "b"]}'),
    one("three quotes", "[python(code='''print('a')\nprint('b')''')]", "python", code="print('a')\nprint('b')"),
    one("a tag", "[search(query='what is </think>?')]", "search", query="what is </think>?"),
    one("apostrophe in a list", "[search(query='x', tags=['it's', 'b'])]", "search", query="x", tags=["it's", "b"]),
    one("apostrophe in a mapping", "[configure(properties={'a': 'it's'})]", "configure", properties={"a": "it's"}),
    # Other ways to say the same.
    one("no brackets", "get_weather(city='Paris')", "get_weather", city="Paris"),
    Shape("no brackets, two lines", "get_weather(city='Paris')\nget_weather(city='Rome')", [PARIS, ROME]),
    Shape("no brackets, a comma", "get_weather(city='Paris'), get_weather(city='Rome')", [PARIS, ROME]),
    Shape("two lists", "[get_weather(city='Paris')]\n[get_weather(city='Rome')]", [PARIS, ROME]),
    Shape("a call a line in a list", "[\n  get_weather(city='Paris'),\n  get_weather(city='Rome'),\n]", [PARIS, ROME]),
    one("space everywhere", " [ get_weather( city = 'Paris' , days = 3 ) ] ", "get_weather", city="Paris", days=3),
    one("trailing comma", "[get_weather(city='Paris',)]", "get_weather", city="Paris"),
    one("code fence", "```python\n[get_weather(city='Paris')]\n```", "get_weather", city="Paris"),
    one("no last bracket", "[get_weather(city='Paris')", "get_weather", city="Paris"),
    one("JSON's words", "[set_flags(enabled=true, label=null)]", "set_flags", enabled=True, label=None),
    one("Python's words in a mapping", "[configure(properties={'a': True, 'b': None})]", "configure", properties={"a": True, "b": None}),
    one("tuple", "[plot(points=[(1, 2), (3, 4)])]", "plot", points=[[1, 2], [3, 4]]),
    one("set", "[search(query='x', tags={'a', 'b'})]", "search", query="x", tags=["a", "b"]),
    one("plus sign", "[search(query='x', limit=+7)]", "search", query="x", limit=7),
    one("colons for equals", "[get_weather(city: 'Paris', days: 3)]", "get_weather", city="Paris", days=3),
    one("word without quotes", "[get_weather(city='Paris', unit=celsius)]", "get_weather", city="Paris", unit="celsius"),
    one("date without quotes", "[search(query=2026-01-02)]", "search", query="2026-01-02"),
    one("unpacked mapping", "[search(**{'query': 'cats', 'limit': 2})]", "search", query="cats", limit=2),
    one("wrapped in properties", '[get_weather(properties={"city": "Paris", "days": 3})]', "get_weather", city="Paris", days=3),
    one("a parameter named properties", '[configure(properties={"a": 1})]', "configure", properties={"a": 1}),
    one("a mapping alone", '[get_weather({"city": "Paris"})]', "get_weather", city="Paris"),
    one("positional", "[get_weather('Paris')]", "get_weather", city="Paris"),
    one("positional, then named", "[get_weather('Paris', days=3)]", "get_weather", city="Paris", days=3),
    one("positional in the schema's order", "[search('cats', 3, 'en')]", "search", query="cats", limit=3, language="en"),
    # JSON.
    one("JSON list", '[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "get_weather", city="Paris"),
    Shape(
        "JSON list of two",
        '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "get_weather", "arguments": {"city": "Rome"}}]',
        [PARIS, ROME],
    ),
    one("JSON object", '{"name": "search", "arguments": {"query": "it\'s", "tags": ["a"]}}', "search", query="it's", tags=["a"]),
    Shape(
        "JSON lines",
        '{"name": "get_weather", "arguments": {"city": "Paris"}}\n{"name": "get_weather", "arguments": {"city": "Rome"}}',
        [PARIS, ROME],
    ),
    one("JSON, arguments as text", r'[{"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}]', "get_weather", city="Paris"),
    one("JSON, parameters", '[{"name": "get_weather", "parameters": {"city": "Paris"}}]', "get_weather", city="Paris"),
    one("JSON, no arguments", '[{"name": "ping"}]', "ping"),
    one(
        "JSON as in a request", '[{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]',
        "get_weather", city="Paris",
    ),
    # Coerced to the schema.
    one("integer in quotes", "[get_weather(city='Paris', days='3')]", "get_weather", city="Paris", days=3),
    one("whole fraction for an integer", "[get_weather(city='Paris', days=3.0)]", "get_weather", city="Paris", days=3),
    one("truth in quotes", "[set_flags(enabled='true')]", "set_flags", enabled=True),
    one("number for a string", "[search(query=42)]", "search", query="42"),
    one("leading zero", "[send(zip=02139)]", "send", zip="02139"),
    one("trailing zero", "[send(version=1.10)]", "send", version="1.10"),
    one("list in quotes", "[search(query='x', tags='[\"a\", \"b\"]')]", "search", query="x", tags=["a", "b"]),
    one("numbers in quotes in a list", "[plot(points=[['1', 2]])]", "plot", points=[[1, 2]]),
    one("one of two types", "[send(reference='7')]", "send", reference=7),
    one("null for what may be left out", "[get_weather(city='Paris', unit=None)]", "get_weather", city="Paris"),
    # No call, or none that the tool takes.
    Shape("empty", "", None),
    Shape("empty list", "[]", None),
    Shape("prose", "I would call get_weather now.", None),
    Shape("a list of names", "[get_weather]", None),
    Shape("cut inside a string", "[get_weather(city='Par", None),
    Shape("cut inside the arguments", "[get_weather(city='Paris', days=", None),
    Shape("cut inside the second call", "[get_weather(city='Paris'), get_weather(ci", None),
    Shape("prose after the call", "[get_weather(city='Paris')] and then we see", None),
    Shape("unknown tool", "[get_wether(city='Paris')]", None),
    Shape("one call of two is unknown", "[get_weather(city='Paris'), fly(to='Rome')]", None),
    Shape("required argument missing", "[get_weather(days=3)]", None),
    Shape("not an integer", "[get_weather(city='Paris', days=3.5)]", None),
    Shape("beyond the limit", "[get_weather(city='Paris', days=15)]", None),
    Shape("not in the enumeration", "[get_weather(city='Paris', unit='kelvin')]", None),
    Shape("text for truth", "[set_flags(enabled='maybe')]", None),
    Shape("infinite number", "[set_flags(ratio=1e999)]", None),
    Shape("expression", "[set_flags(ratio=1 + 2)]", None),
    Shape("call as a value", "[search(query=ping())]", None),
    Shape("argument given twice", "[get_weather(city='Paris', city='Rome')]", None),
    Shape("too many positional", "[sql('a', 'b')]", None),
    Shape("positional behind named", "[get_weather(days=3, 'Paris')]", None),
    Shape("JSON cut", '[{"name": "get_weather", "arguments": {"city": "Par', None),
    Shape("JSON without a name", '[{"arguments": {"city": "Paris"}}]', None),
]  # fmt: skip
