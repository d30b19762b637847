"""Gemma 4 beside a tower, whose inner model reads a row of the embedding, wherever a plan may leave that."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from tests import tiny  # noqa: E402
from tests.engines import ask, request  # noqa: E402
from tests.gpu.test_image_text import in_ram, loaded  # noqa: E402
from tests.gpu.test_placed import DEVICE, HYBRID, ON_GPU  # noqa: E402
from tests.placements import Where  # noqa: E402

AWAY = {
    "in RAM": ("cpu", DEVICE, False, ""),
    "on the disk": ("disk", DEVICE, False, ""),
    "on the disk, with a copy in RAM": ("disk", DEVICE, True, ""),
}
REST = {
    "resident": ON_GPU["resident"],
    "streamed": ON_GPU["streamed"],
    "mixed": HYBRID["visiting in prompts"],
}


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / request.param
    return tiny.save_gemma4_vision(path, tied=request.param == "tied")


@pytest.mark.parametrize("rest", REST)
@pytest.mark.parametrize("place", AWAY)
def test_answers_are_the_same_wherever_the_embedding_is(folder: Path, place: str, rest: str) -> None:
    def where(number: int, label: str) -> Where:
        return AWAY[place] if label in ("embed", "head") else REST[rest](number, label)

    wanted, engine = in_ram(folder), loaded(folder, where)
    for prompt in ("The capital of France is", "And of <|user|> Spain? " * 8):
        asked = request(prompt, max_new_tokens=16)
        for _ in range(2):
            assert ask(engine, asked).text == ask(wanted, asked).text
    engine.close()
    wanted.close()
