"""A conversation on a terminal: `python -m lfm_mlx.chat`.

program ─▶ session ─▶ responder ─▶ stream, cache        the model's side
           session ─▶ conversation, commands            what was said, and what to do about it
           session ─▶ tools ─▶ tool_worker (a process)  functions of a Python file
           session ─▶ view: plain, or screen ─▶ blocks  what the person sees
                                          blocks ─▶ pieces ─▶ markdown
"""
