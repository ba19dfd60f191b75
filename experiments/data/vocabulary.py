"""Text as pieces of words and back, with sentencepiece."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece

# Not sentencepiece's defaults, which are no padding, begin 1, end 2 and unknown 0.
PADDING, BEGIN, END, UNKNOWN = 0, 1, 2, 3


@dataclass(frozen=True)
class Vocabulary:
    """A sentencepiece model.

    Attributes:
      model: serialized, as in a `.model` file.
    """

    model: bytes

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    def __len__(self) -> int:
        return int(self._processor.get_piece_size())

    @property
    def fingerprint(self) -> str:
        """The same for the same pieces."""
        return f"{len(self)} pieces {hashlib.sha256(self.model).hexdigest()[:16]}"

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Pieces of each sentence, without begin and end."""
        encoded: list[list[int]] = self._processor.encode(list(sentences))
        return encoded

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Text of each row, up to its first end; padding says nothing."""
        return [self._processor.decode(_before_end(row)) for row in rows]


def train_vocabulary(sentences: Iterable[str], size: int) -> Vocabulary:
    """Finds the pieces of a corpus by byte-pair encoding. The same corpus gives the same pieces.

    Args:
      sentences: of all languages together.
      size: pieces, the four special ones and all characters of the corpus among them.

    Raises:
      ValueError: if the size does not fit the corpus; says what would.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            # Every character gets a piece, so that text survives encoding and decoding.
            character_coverage=1.0,
            pad_id=PADDING,
            bos_id=BEGIN,
            eos_id=END,
            unk_id=UNKNOWN,
            num_threads=1,
            # Errors only; otherwise it writes its progress to stderr.
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"cannot make a vocabulary of {size} pieces: {error}") from error
    return Vocabulary(model.getvalue())


def load_vocabulary(path: Path, *, size: int) -> Vocabulary:
    """Reads a `.model` file.

    Raises:
      ValueError: if it is not a vocabulary, numbers the special pieces differently, or does not
        have `size` pieces.
    """
    try:
        vocabulary = Vocabulary(path.read_bytes())
        found = len(vocabulary)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
    processor = vocabulary._processor
    special = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
    if special != (PADDING, BEGIN, END, UNKNOWN):
        raise ValueError(
            f"{path} numbers padding, begin, end and unknown {special}, expected "
            f"{(PADDING, BEGIN, END, UNKNOWN)}: delete it to make another"
        )
    if found != size:
        raise ValueError(f"{path} has {found} pieces, expected {size}: delete it to make another")
    return vocabulary


def _before_end(row: Sequence[int]) -> list[int]:
    tokens = [int(token) for token in row]
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return [token for token in tokens if token not in (PADDING, BEGIN)]
