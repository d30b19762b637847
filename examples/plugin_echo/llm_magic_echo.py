"""A backend and a command for llm_magic: ``%llm load echo:anything``, then prompts come back word by word."""

import time

from llm_magic.events import Finish, RenderedPrompt, SweepSpeed, TokenEvent
from llm_magic.hookspecs import Command, hookimpl
from llm_magic.model import Block, ModelLayout, TensorInfo

BLOCK = Block("echo", "layers.0", "decoder", (TensorInfo("echo.weight", (1,), "float32", 4),))


class EchoEngine:
    model = None

    def __init__(self, plan):
        self.plan = plan

    def render(self, request):
        text = request.messages[-1].content
        return RenderedPrompt(text, len(text.split()))

    def generate(self, request, emit, stop):
        words, start, said = self.render(request).text.split(), time.perf_counter(), 0
        for word in words[: request.sampling.max_new_tokens]:
            if stop.is_set():
                break
            emit(TokenEvent(f" {word}" if said else word))
            said += 1
        reason = "stopped" if stop.is_set() else "stop" if said == len(words) else "length"
        return Finish(reason, len(words), 0, said, 0.0, time.perf_counter() - start)

    def memory(self):
        return {"cpu": {"weights": BLOCK.bytes}}

    def status(self):
        return ("by heart",)

    def apply(self, plan, progress):
        self.plan = plan
        return {}

    def measure(self, progress):
        return SweepSpeed(0.0, 0.0, 0)

    def forget(self, chat): ...

    def close(self): ...


class EchoBackend:
    name = "echo"

    def accepts(self, spec):
        return 1.0 if spec.source.startswith("echo:") else 0.0

    def layout(self, spec, progress):
        return ModelLayout(spec.source.removeprefix("echo:"), "Echo", (BLOCK,), "float32", 4096, 1, 1, 1)

    def load(self, spec, plan, progress):
        return EchoEngine(plan)


def shout(session, arguments):
    print(" ".join(arguments.words).upper() + "!")


@hookimpl
def register_backends(register):
    register(EchoBackend())


@hookimpl
def register_commands(register):
    add = lambda parser: parser.add_argument("words", nargs="+")  # noqa: E731 (one line says it all)
    register(Command("shout", "Say it louder.", shout, add, examples=("%llm shout hello",)))
