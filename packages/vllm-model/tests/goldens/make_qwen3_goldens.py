"""Makes the golden conversations of Qwen3 with transformers, from a folder with the tokenizer of Qwen/Qwen3-0.6B.

python packages/vllm-model/tests/goldens/make_qwen3_goldens.py FOLDER
"""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND = "python packages/vllm-model/tests/goldens/make_qwen3_goldens.py FOLDER"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now: 'sunny' & <warm>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "z.\u00a0B. München"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "東京", "days": 2}}}
TWO_CALLS = [CALL, {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "São Paulo"}}}]


def user(text: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    """A system message."""
    return {"role": "system", "content": text}


def result(text: str) -> dict[str, Any]:
    """A tool's answer."""
    return {"role": "tool", "content": text}


ASKED = [user("Weather in 東京?"), assistant("", tool_calls=[CALL]), result('{"sky": "clear", "t": 21.5}')]
CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    ("one question", [user("What is the capital of France?")], {}),
    ("thinking off", [user("What is the capital of France?")], {"enable_thinking": False}),
    ("thinking on", [user("Why?")], {"enable_thinking": True}),
    ("system", [system("Be brief."), user("Hi")], {}),
    ("empty system", [system(""), user("Hi")], {}),
    ("two turns", [user("1+1?"), assistant("2"), user("+1?")], {}),
    ("no generation prompt", [user("1+1?"), assistant("2")], {"add_generation_prompt": False}),
    ("thought in history", [user("1+1?"), assistant("<think>\nadd them\n</think>\n\n2"), user("+1?")], {}),
    ("thought in the last turn", [user("1+1?"), assistant("<think>\nadd\n</think>\n\n2")], {"add_generation_prompt": False}),
    ("reasoning_content", [user("1+1?"), assistant("2", reasoning_content="add them")], {"add_generation_prompt": False}),
    ("unicode", [user("Grüße, мир, 世界, עולם, ﷽, Zürich\u200b\u0301 ½ ² ٣")], {}),
    ("emoji", [user("👩‍👩‍👧‍👦 👍🏽 🇫🇷 ❤️ and \U0001f9ff")], {}),
    ("code", [user("def f(x):\n\tif x:\n\t    return 'a\\n' * 10_000  # 12345 67\r\n\r\n\n")], {}),
    ("spaces", [user("  leading,   inner \t\n trailing  \n\n"), assistant(" a "), user("\n")], {}),
    ("tools", [user("Weather in Paris?")], {"tools": [WEATHER]}),
    ("tools and system", [system("You are a bot."), user("Weather?")], {"tools": [WEATHER, WEATHER], "enable_thinking": False}),
    ("tool result", ASKED, {"tools": [WEATHER]}),
    (
        "two calls and results",
        [user("Both?"), assistant("Let me see.", tool_calls=TWO_CALLS), result("21"), result("<b>30 & more</b>")],
        {"tools": [WEATHER]},
    ),
    ("after a tool", [*ASKED, assistant("<think>\nclear\n</think>\n\nClear, 21.5 °C."), user("Thanks!")], {"tools": [WEATHER]}),
    ("long", [m for i in range(12) for m in (user(f"{i} " * i), assistant(f"answer {i}"))] + [user("end")], {}),
]


def main() -> None:
    """Write ``qwen3_chat.json`` and ``qwen3_tokenizer.json.xz``."""
    import transformers

    folder = Path(sys.argv[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    cases = []
    for name, messages, options in CASES:
        arguments = {"add_generation_prompt": True, **options}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
        cases.append({"name": name, "messages": messages, "options": arguments, "text": text, "token_ids": list(ids)})
    goldens = {"command": COMMAND, "transformers": transformers.__version__, "cases": cases}
    (HERE / "qwen3_chat.json").write_text(json.dumps(goldens, ensure_ascii=False, indent=1) + "\n")
    parts = {}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        parts[name] = json.loads((folder / name).read_text())
    data = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()
    (HERE / "qwen3_tokenizer.json.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
