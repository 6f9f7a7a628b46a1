"""Model folders and hub names: what can go wrong as they are read, in one line each."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import huggingface_hub
import torch
import torch.distributed as dist
from huggingface_hub import constants

from tezo_ds.errors import ConfigError, TezoError

WAIT = 5.0  # seconds for the hub's first answer


@contextmanager
def explained(what: str, name: str) -> Iterator[None]:
    """Context manager: an error over a folder's files, or a hub name, inside becomes a ConfigError.

    A ValueError's or OSError's words are for users; transformers, tokenizers and safetensors raise much
    else over damaged files, with no common base.

    Args:
        what: "model" or "tokenizer".
        name: folder or hub name.
    """
    try:
        with _offline_if_unreachable(name) as unreachable:
            yield
    except (TezoError, dist.DistError, torch.OutOfMemoryError):
        raise  # not about the files
    except AssertionError as error:
        if "adding_idx" not in str(error):
            raise
        reason = (
            "pad_token_id of its config.json is outside of the vocabulary (vocab_size); set it to a "
            "token's id, or to null"
        )
        raise ConfigError(_not_loaded(what, name, reason)) from None
    except ImportError as error:  # of a quantised checkpoint, or a tokenizer's library
        reason = _shortened(str(error))
        if "pip install" in reason or "GPU" not in reason:  # which some forms cannot be without
            reason = f"a package is missing: {reason}"
        raise ConfigError(_not_loaded(what, name, reason)) from None
    except (OSError, ValueError) as error:
        reason = _own_code(str(error)) or str(error).split("\n")[0]
        if what == "tokenizer" and "tiktoken" in reason and find_spec("sentencepiece") is None:
            reason = "it needs SentencePiece, which is missing; pip install sentencepiece"
        if unreachable and isinstance(error, OSError):
            reason = f"{constants.ENDPOINT} does not answer, and it is not in the cache"
        raise ConfigError(_not_loaded(what, name, reason)) from None
    except Exception as error:
        cause = error.__cause__ or error
        reason = _shortened(f"{type(cause).__name__}: {cause}")
        if "GPU" not in reason:  # which some quantised weights cannot be without
            reason = f"its files are damaged ({reason})"
        raise ConfigError(_not_loaded(what, name, reason)) from error


@contextmanager
def _offline_if_unreachable(name: str) -> Iterator[bool]:
    """Context manager: inside, a hub that does not answer counts as offline, so that what is cached loads
    at once, where its client would try for a minute; gives whether that is so."""
    unreachable = not (os.path.exists(name) or constants.HF_HUB_OFFLINE or _hub_answers())
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or unreachable
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.cache
def _hub_answers() -> bool:
    """Returns whether the hub gives any answer; asked once, by the client that has the user's proxies."""
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=WAIT)
    except Exception:  # of whichever library the client is of
        return False
    return True


def _own_code(error: str) -> str | None:
    """Returns what to do about a model or tokenizer of its own code; None for another error."""
    if "custom code" not in error and "trust_remote_code" not in error:
        return None
    return (
        "it brings Python code of its own, which is not run unless --trust-remote-code is given; read "
        "that code before"
    )


def _shortened(text: str) -> str:
    return textwrap.shorten(text, 300, placeholder=" …")


def _not_loaded(what: str, name: str, reason: str) -> str:
    hint = "" if os.path.isdir(name) else "; give a folder made by save_pretrained, or a hub name"
    return f"cannot load a {what} from {name!r}: {reason}{hint}"
