"""Which of transformers' auto classes loads a configuration, and what of the model text runs through.

A model of images and text answers text alone, too, where transformers' own loop generates with it: what
it sees with stays unused then.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from llm_magic.errors import OptionError, SourceError

_NEED_IMAGES = ("idefics",)
"""``model_type``s that refuse text alone, and only say so when they run."""

_TEXT_HELP = (
    "Load a model for text generation (a causal language model, an encoder-decoder, an image-text-to-text)."
)


def auto_class(config: Any) -> Any:
    """The auto class of transformers that loads a model with this configuration, to answer text.

    Raises
    ------
    SourceError
        When none does, with the reason.
    """
    import transformers

    kind = type(config)
    if config.is_encoder_decoder:
        usual = transformers.AutoModelForSeq2SeqLM
    else:
        usual = transformers.AutoModelForCausalLM
    if kind in usual._model_mapping and not _fills_gaps(config):
        return usual
    seeing = transformers.AutoModelForImageTextToText
    if kind in seeing._model_mapping:
        if reason := _why_not_text_alone(config, _model_class(seeing, config)):
            raise SourceError(f"A model of the kind {config.model_type!r} {reason}.", _TEXT_HELP)
        return seeing
    hearing = (transformers.AutoModelForMultimodalLM, transformers.AutoModelForSpeechSeq2Seq)
    if any(kind in auto._model_mapping for auto in hearing):
        reason = "is made for speech or sound, which llm_magic does not support"
    else:
        reason = "does not generate text"
    raise SourceError(f"A model of the kind {config.model_type!r} {reason}.", _TEXT_HELP)


def beside_the_text(model: Any) -> frozenset[int]:
    """``id``s of the modules and parameters of a model that no pass over text visits.

    These are the towers for images, video and sound of an image-text-to-text model, and what joins
    them to its language model: all that is outside of that, and neither embeds tokens nor makes logits.
    """
    from transformers import AutoModelForImageTextToText

    decoder = decoder_of(model)
    if type(model.config) not in AutoModelForImageTextToText._model_mapping or decoder is model:
        return frozenset()
    text = {id(part) for root in (decoder, model.get_input_embeddings()) for part in _parts(root)}
    text |= {id(part) for part in _parts(output_embeddings(model))}
    return frozenset(_outside(model, text))


def decoder_of(model: Any) -> Any:
    """The language model in a model, without its head; the model itself where it has no such part."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def output_embeddings(model: Any) -> Any:
    """What makes logits, also where only the language model in the model knows; ``None`` without any."""
    found, decoder = model.get_output_embeddings(), decoder_of(model)
    if found is None and hasattr(decoder, "get_output_embeddings"):
        return decoder.get_output_embeddings()
    return found


def path_of_head(model: Any) -> str:
    """The path of the linear layer that makes logits.

    Raises
    ------
    OptionError
        When there is none, or it is of another kind.
    """
    from torch.nn import Linear

    head = output_embeddings(model)
    if not isinstance(head, Linear):
        raise OptionError(
            f"The head of {type(model).__name__} is no linear layer that could be packed.",
            "Leave out --quantize-head.",
        )
    return str(next(path for path, module in model.named_modules() if module is head))


def _fills_gaps(config: Any) -> bool:
    """Whether it is a masked language model, which the causal classes build all the same."""
    from transformers import AutoModelForMaskedLM

    is_masked = type(config) in AutoModelForMaskedLM._model_mapping
    return is_masked and getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder


def _model_class(auto: Any, config: Any) -> Any:
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, list | tuple) else found


def _why_not_text_alone(config: Any, model_class: Any) -> str:
    """What keeps an image-text-to-text model from answering text alone; empty when nothing does."""
    from transformers import GenerationMixin

    takes = inspect.signature(model_class.forward).parameters
    pixels = takes.get("pixel_values")
    must_see = pixels is not None and pixels.default is pixels.empty
    if must_see or config.is_encoder_decoder or config.model_type in _NEED_IMAGES:
        return "needs an image with every prompt, and prompts are text here"
    if not model_class.can_generate():
        return "does not generate text"
    if model_class.generate is not GenerationMixin.generate:
        return "generates in a way of its own, not with transformers' loop from token to token"
    return ""


def _parts(root: Any) -> Iterator[Any]:
    if root is not None:
        yield from root.modules()
        yield from root.parameters()


def _outside(module: Any, text: set[int]) -> Iterator[int]:
    """The parts of a module that hold no part of the text's."""
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in text:
            yield id(parameter)
    for name, child in module.named_children():
        if id(child) in text or name.startswith("embed"):  # some look up tokens of images there in any prompt
            continue
        if any(id(part) in text for part in child.modules()):
            yield from _outside(child, text)
        else:
            yield id(child)
