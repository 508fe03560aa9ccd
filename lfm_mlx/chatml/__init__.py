"""Messages ⇄ text: the checkpoint's chat template one way, typed segments the other.

Never sees an array. Going in, messages become token ids (`render`), and content stays content
whatever it spells. Coming out, token ids become text (`TextStream`), and text becomes segments
(`segments`): thinking, text, and tool calls that fit the tools.

    messages ─▶ template ─▶ prompt ─▶ model ─▶ token_text ─▶ tags ─▶ segments
                                     tool_calls ◀─ python_calls, json_calls, schema ┘
"""

from lfm_mlx.chatml.prompt import ends_in_thinking, render
from lfm_mlx.chatml.segments import Segment, Segmenter, as_message, segments
from lfm_mlx.chatml.tags import TAGS, TEXT, THINKING, TOOL_CALL
from lfm_mlx.chatml.token_text import TextStream, vocabulary_fingerprint
from lfm_mlx.tool_calls.parse import Call, CallError, parse

__all__ = [
    "TAGS",
    "TEXT",
    "THINKING",
    "TOOL_CALL",
    "Call",
    "CallError",
    "Segment",
    "Segmenter",
    "TextStream",
    "as_message",
    "ends_in_thinking",
    "parse",
    "render",
    "segments",
    "vocabulary_fingerprint",
]
