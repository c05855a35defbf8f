"""Token ids of texts, whose control tokens are text, and of rendered chats, where those of the template count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from moa_lab.prompting.controls import Controls, controls_of, unused_characters

# Supplementary private use area A; area B has the marks of `rendering`.
STAND_INS = 0xF0000


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a user's text: a control token that it spells is cut into ordinary tokens.

    Text without control tokens has exactly the ids that the tokenizer gives it. add_special_tokens: those that the tokenizer puts
    around every text (BOS).
    """
    return text_tokens(tokenizer, text, add_special_tokens=add_special_tokens)[0]


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False, offsets: bool = False
) -> tuple[list[int], list[tuple[int, int]]]:
    """`text_ids`, and with `offsets` the [begin, end) characters of every token (fast tokenizers only), else an empty list."""
    # verbose=False: no warning for a text longer than the model's context.
    options: dict[str, Any] = {"add_special_tokens": add_special_tokens, "verbose": False}
    found = tokenizer(text, **options, **({"return_offsets_mapping": True} if offsets else {}))
    if not _spells_controls(tokenizer, text, () if add_special_tokens else found.input_ids):
        return list(found.input_ids), list(found.offset_mapping) if offsets else []
    if not tokenizer.is_fast:
        return list(tokenizer(text, **options, split_special_tokens=True).input_ids), []
    encoding = _without_controls(tokenizer, text).encode(text, add_special_tokens)
    return encoding.ids, encoding.offsets if offsets else []


def rendered_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, quoted: Mapping[str, str] | None = None, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of a rendered chat: the control tokens in `text` are recognised.

    quoted: placeholder characters in `text`, mapped to the control tokens that the user wrote, which are encoded as text.
    """
    if not quoted:
        return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
    if not tokenizer.is_fast:
        return _rendered_slowly(tokenizer, text, quoted, add_special_tokens)
    plain = _without_controls(tokenizer, text)
    controls = controls_of(tokenizer)
    text = controls.pattern.sub(lambda match: plain.stand_ins[match[0]], text)
    for character, content in quoted.items():
        text = text.replace(character, content)
    return plain.encode(text, add_special_tokens).ids


@dataclass(frozen=True)
class _Encoding:
    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class _Plain:
    """The tokenizer's backend with every control token renamed to one private-use character.

    Everything else (normalisation, prefix spaces, merges) is unchanged, so texts are tokenized as if control tokens did not exist;
    the private character gives the control token, with its stripping of blanks.
    """

    backend: Tokenizer
    stand_ins: Mapping[str, str]
    real: Mapping[int, int]

    def encode(self, text: str, add_special_tokens: bool) -> _Encoding:
        found = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return _Encoding([self.real.get(token, token) for token in found.ids], found.offsets)


_made: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Controls, _Plain]] = WeakKeyDictionary()


def _spells_controls(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> bool:
    """Whether `text` holds a control token. ids: those that the tokenizer gives it."""
    controls = controls_of(tokenizer)
    if not controls.ids:
        return False
    # Look at the ids too: a tokenizer may normalise before it matches ("<BOS>"). The unknown token may stand for any text.
    return controls.pattern.search(text) is not None or bool(controls.marks.intersection(ids) - {tokenizer.unk_token_id})


def _without_controls(tokenizer: PreTrainedTokenizerBase, text: str) -> _Plain:
    controls = controls_of(tokenizer)
    original: Tokenizer = tokenizer.backend_tokenizer
    known = _made.get(tokenizer)
    if known is None or known[0] is not controls or any(character in text for character in known[1].stand_ins.values()):
        characters = unused_characters(text, STAND_INS)
        known = _made[tokenizer] = (controls, _respelled(original, {content: next(characters) for content in controls.ids}, controls))
    # These may have been changed in place (`tokenizer.add_bos_token = True`); the vocabulary cannot.
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        setattr(known[1].backend, part, getattr(original, part))
    return known[1]


def _respelled(original: Tokenizer, stand_ins: Mapping[str, str], controls: Controls) -> _Plain:
    data = json.loads(original.to_str())
    for token in data["added_tokens"]:
        token["content"] = stand_ins.get(token["content"], token["content"])
    _respell_model(data["model"], stand_ins)
    # Some tokenizers number added tokens differently when read again, hence `real`.
    backend = Tokenizer.from_str(json.dumps(data))
    backend.no_truncation()
    backend.no_padding()
    real = {backend.token_to_id(stand_ins[content]): index for content, index in controls.ids.items()}
    return _Plain(backend, stand_ins, {made: index for made, index in real.items() if made is not None and made != index})


def _respell_model(model: dict[str, Any], stand_ins: Mapping[str, str]) -> None:
    """Rename control tokens in the vocabulary, and drop the merges that lead to them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {stand_ins.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # Unigram: (piece, score) pairs
        model["vocab"] = [[stand_ins.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in stand_ins:
        model["unk_token"] = stand_ins[model["unk_token"]]
    if model.get("merges"):
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & stand_ins.keys()]


def _rendered_slowly(tokenizer: PreTrainedTokenizerBase, text: str, quoted: Mapping[str, str], add_special_tokens: bool) -> list[int]:
    """For tokenizers in Python, whose control tokens cannot be renamed: each text between the template's is encoded on its own."""
    controls = controls_of(tokenizer)
    ids: list[int] = []
    last = 0
    for match in [*controls.pattern.finditer(text), None]:
        piece = text[last : match.start() if match else len(text)]
        for character, content in quoted.items():
            piece = piece.replace(character, content)
        ids += text_ids(tokenizer, piece) if piece else []
        if match:
            ids.append(controls.ids[match[0]])
            last = match.end()
    return tokenizer.build_inputs_with_special_tokens(ids) if add_special_tokens else ids
