# mypy: ignore-errors
"""Made `reference.jsonl.gz`: token ids that vLLM 0.32's own renderer gives for request bodies of every shape.

Not needed to run the tests. Run it with a Python that has vLLM 0.32 (no engine is started):

    python make_reference.py reference.jsonl.gz

`models/*` are changes to the tokenizer of tests/data/models/tiny, and templates of the kinds in use: one that takes
content as text (tools, reasoning, namespaces), one that takes parts (a beginning-of-text token, the date, JSON).
"""

import asyncio
import gzip
import json
import random
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config

HERE = Path(__file__).parent
TINY = HERE.parent / "models" / "tiny"
WORDS = [
    "the",
    "quick",
    "heap",
    "item",
    "returns",
    "None",
    "(x,",
    "y)",
    "=",
    "sorted(values)",
    "naïve",
    "café",
    "東京",
    "данные",
    "🙂",
    "👩\u200d👩\u200d👧",
    "नमस्ते",
    "\xa0",
    "é",
    "é",
    "ﬁ",
    "if",
    "not:\n\tpass\n",
    "\r\n",
    "3.14",
    "<b>",
    "&amp;",
    "'ll",
    "'S",
    "{}",
    "{{",
    "}}",
    "{%",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|endoftext|>",
    "<|late|>",
    "<|im_",
    "<|begin_of_text|>",
]
BODY_CHARS_MAX = 1700


class Bodies:
    """Random request bodies, the same for the same seed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def odds(self, p):
        return self.rng.random() < p

    def text(self, n=None):
        n = self.rng.choice([0, 1, 2, 5, 20, 80]) if n is None else n
        joiner = self.rng.choice([" ", "\n", ""])
        words = joiner.join(self.rng.choice(WORDS) for _ in range(n))
        return self.rng.choice(["", " ", "\n", ""]) + words + self.rng.choice(["", "  ", "\n", ""])

    def part(self, role):
        text = {"type": "text", "text": self.text()}
        if role not in ("user", "alien"):
            return text
        kinds = [
            text,
            text,
            text,
            {**text, "cache_control": {"type": "ephemeral"}, "x": 1},
            {"type": "refusal", "refusal": self.text(3)},
            {"type": "thinking", "thinking": self.text(3)},
            {"type": "tool_reference", "name": "get_weather"},
        ]
        return self.rng.choice(kinds)

    def content(self, role):
        if self.odds(0.6):
            return self.text()
        return [self.part(role) for _ in range(self.rng.randrange(0 if self.odds(0.1) else 1, 4))]

    def shuffled(self, fields):
        return dict(self.rng.sample(list(fields.items()), len(fields)))

    def tool(self):
        described = {"type": "string", "description": self.text(3)}
        schema = {"type": "object", "properties": dict.fromkeys(self.rng.sample("zyxab", 2), described)}
        if self.odds(0.4):
            schema["default"] = self.rng.choice([1.5, 1e30, None, True, "é<>&'"])
        function = {"name": self.rng.choice(["get_weather", "f", "ünï"])}
        for name, value, p in (
            ("description", self.text(4), 0.8),
            ("parameters", schema, 0.8),
            ("strict", self.odds(0.5), 0.3),
            ("extra", 1, 0.2),
            ("defer_loading", True, 0.1),
        ):
            if self.odds(p):
                function[name] = value
        tool = {"type": "function", "function": self.shuffled(function)}
        for name, value in (("defer_loading", self.odds(0.5)), ("junk", 2)):
            if self.odds(0.1):
                tool[name] = value
        if self.odds(0.1):
            del tool["type"]
        return tool

    def call(self, i):
        arguments = ['{"b": 1, "a": [2, "é"]}', "", "{}", "[1]", "not json", '{"x": 1.0, "y": null}', '"s"', "null"]
        function = self.shuffled({"name": "f", "arguments": self.rng.choice(arguments)})
        call = self.shuffled({"id": f"c{i}", "type": "function", "function": function})
        if self.odds(0.15):
            call["index"] = 0
        if self.odds(0.15):
            function["extra"] = [1]
        return call

    def assistant(self):
        thought = f"<think>\n{self.text(4)}\n</think>\n\n{self.text()}"
        contents = [self.text(), None, [self.part("assistant")], thought]
        message = {"role": "assistant", "content": self.rng.choice(contents)}
        if self.odds(0.4):
            message["tool_calls"] = [self.call(i) for i in range(self.rng.choice([0, 1, 1, 2]))]
        if self.odds(0.25):
            field = self.rng.choice(["reasoning", "reasoning_content"])
            message[field] = self.rng.choice([self.text(4), None])
        return message

    def messages(self):
        out = []
        if self.odds(0.4):
            billed = f"x-anthropic-billing-header: cch={self.rng.randrange(9)}\n{self.text()}"
            out.append({"role": "system", "content": self.rng.choice([self.content("system"), billed])})
        if self.odds(0.15):
            developer = {"role": "developer", "content": self.content("developer")}
            if self.odds(0.3):
                developer["tools"] = [self.tool()]
            out.insert(self.rng.randrange(len(out) + 1), developer)
        for _ in range(self.rng.randrange(1, 5)):
            out.append({"role": "user", "content": self.content("user")})
            if self.odds(0.6):
                answer = self.assistant()
                out.append(answer)
                for call in answer.get("tool_calls", []):
                    content = self.rng.choice([self.text(), [self.part("tool"), self.part("tool")]])
                    out.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        for role, p in (("alien", 0.03), ("system", 0.1)):
            if self.odds(p):
                out.append({"role": role, "content": self.text()})
        return out

    def chat(self):
        body = {"messages": self.messages()}
        if self.odds(0.3):
            body["tools"] = [self.tool() for _ in range(self.rng.randrange(1, 3))]
        if self.odds(0.35):
            kwargs = [
                {"enable_thinking": False},
                {"enable_thinking": None},
                {"date_string": "1 Jan 2025"},
                {"unknown": 5, "add_generation_prompt": False},
                {"reasoning_effort": "auto"},
                {"documents": [{"title": "a", "text": "b"}]},
                {"tools": [{"any": "thing"}]},
                {"bos_token": "<BOS>"},
            ]
            body["chat_template_kwargs"] = self.rng.choice(kwargs)
        if self.odds(0.15):
            body["reasoning_effort"] = self.rng.choice(["low", "none", "high", None])
        if self.odds(0.1):
            body["documents"] = [{"title": "T é", "text": self.text(4)}]
        if self.odds(0.2):
            body["add_generation_prompt"] = False
            if self.odds(0.6):
                body["continue_final_message"] = True
                final = self.rng.choice(["I will  ", f"Sure,\n\n{self.text(6)}", [{"type": "text", "text": "So "}]])
                body["messages"].append({"role": "assistant", "content": final})
        if self.odds(0.1):
            body["add_special_tokens"] = True
        return {"path": "/v1/chat/completions", "body": self.truncated(body)}

    def completion(self):
        ids = [self.rng.randrange(7000) for _ in range(self.rng.randrange(1, 50))]
        prompts = [self.text(40), self.text(5), [self.text(5), self.text(1)], ids, [ids[:5], ids]]
        body = {"prompt": self.rng.choice(prompts)}
        if self.odds(0.2):
            body["add_special_tokens"] = self.odds(0.5)
        return {"path": "/v1/completions", "body": self.truncated(body)}

    def truncated(self, body):
        if self.odds(0.1):
            body["truncate_prompt_tokens"] = self.rng.randrange(1, 20)
            if self.odds(0.5):
                body["truncation_side"] = self.rng.choice(["left", "right"])
        return body

    def tokenize(self):
        if self.odds(0.3):
            return {"path": "/tokenize", "body": {"prompt": self.text(20), "add_special_tokens": self.odds(0.5)}}
        return {"path": "/tokenize", "body": self.chat()["body"]}

    def any(self):
        return self.rng.choices([self.chat, self.completion, self.tokenize], [70, 15, 15])[0]()


async def token_ids(renderer, path, body):
    if "messages" in body:
        kind = ChatCompletionRequest if path == "/v1/chat/completions" else TokenizeChatRequest
        request = kind.model_validate(body)
        tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
        _, (made,) = await renderer.preprocess_chat(
            request,
            request.messages,
            default_template=None,
            default_template_content_format="auto",
            default_template_kwargs={},
            tool_dicts=tools,
        )
        return list(made["prompt_token_ids"])
    kind = CompletionRequest if path == "/v1/completions" else TokenizeCompletionRequest
    request = kind.model_validate(body)
    made, *_ = await renderer.preprocess_completion(request, prompt_input=request.prompt, prompt_embeds=None)
    return list(made["prompt_token_ids"])


async def reference(model, folder, seed, count):
    config = EngineArgs(model=str(folder), max_model_len=4096).create_engine_config()
    renderer = OnlineRenderer(
        config.model_config,
        renderer_from_config(config),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    bodies, out = Bodies(seed), []
    while len(out) < count:
        case = bodies.any()
        text = json.dumps(case, ensure_ascii=False)
        if len(text) > BODY_CHARS_MAX:
            continue
        try:
            ids = await token_ids(renderer, case["path"], json.loads(text)["body"])
        except Exception as refused:
            print(model, "refuses a body:", type(refused).__name__, file=sys.stderr)
            continue
        rendered_at = datetime.now().strftime("%Y-%m-%d")
        out.append({"model": model, "rendered_at": rendered_at, **case, "token_ids": ids})
    return out


def model_folder(model, into):
    """The tiny model's files with the changes of `models/<model>`."""
    shutil.copytree(TINY, into)
    if model != "tiny":
        definition = json.loads((TINY / "tokenizer.json").read_text())
        changes = json.loads((HERE / "models" / model / "tokenizer_changes.json").read_text())
        definition["added_tokens"] += changes.pop("added_tokens")
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            shutil.copy(HERE / "models" / model / name, into / name)
        (into / "tokenizer.json").write_text(json.dumps(definition | changes))
    return into


async def main():
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        for model, seed, count in (("tiny", 1, 60), ("qwen_like", 2, 130), ("llama_like", 3, 130)):
            cases += await reference(model, model_folder(model, Path(scratch) / model), seed, count)
    return cases


def write(cases, path):
    lines = (json.dumps(case, ensure_ascii=False, separators=(",", ":")) + "\n" for case in cases)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write("".join(lines).encode())


if __name__ == "__main__":
    write(asyncio.run(main()), sys.argv[1])
