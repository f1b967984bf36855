"""What a recipe may say about where text comes from. Reading it is done in `documents.py` and `sampled.py`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .section import Number, Section
from .templates import check_template, has_fields


TEXT_SUFFIXES = (".txt", ".raw")


class FileSource(Section):
    """Text of a file, or a part of it."""

    file: str = Field(description="Path relative to the data folder: .txt or .raw for plain text, or .jsonl; also with .gz.")
    tokens: int = Field(gt=0, description="How many tokens to take at most.")
    lines: bool = Field(False, description="Plain text: every line is a document; otherwise the file is one.")
    template: str | None = Field(None, description='.jsonl: a document from the fields of a line: "{question}\\n{answer}".')
    chat: list[Annotated[list[str], Field(min_length=2, max_length=2)]] | None = Field(
        None, min_length=1, description='.jsonl: turns for the tokenizer\'s chat template: [["user", "{question}"], ...].'
    )
    start: Number = Field(0.0, ge=0, lt=1, description="Where to begin, as a share of the file (characters or documents).")
    stop: Number = Field(1.0, gt=0, le=1, description="Where to end, as a share of the file.")

    @property
    def is_jsonl(self) -> bool:
        """Whether every line is a JSON object."""
        return self.file.removesuffix(".gz").endswith(".jsonl")

    @model_validator(mode="after")
    def _fits_together(self) -> "FileSource":
        if self.is_jsonl:
            if (self.template is None) == (self.chat is None) or self.lines:
                raise ValueError(f"file={self.file!r} needs either template or chat, and no lines")
            self._check_templates()
        elif not self.file.removesuffix(".gz").endswith(TEXT_SUFFIXES):
            allowed = f".jsonl, {' or '.join(TEXT_SUFFIXES)}, with or without .gz"
            raise ValueError(f"file={self.file!r} is not allowed: it must end in {allowed}")
        elif self.template is not None or self.chat is not None:
            raise ValueError(f"template and chat are for .jsonl, not for file={self.file!r}")
        if self.start >= self.stop:
            raise ValueError(f"start={self.start} is not allowed: it must be below stop={self.stop}")
        return self

    def _check_templates(self) -> None:
        chat = [content for _, content in self.chat or []]
        given = f"template={self.template!r}" if self.template is not None else f"chat={self.chat!r}"
        texts = [*chat, self.template or ""]
        try:
            for text in texts:
                check_template(text)
        except ValueError as error:
            raise ValueError(f"{given} is not allowed: {error}") from error
        if not any(map(has_fields, texts)):
            raise ValueError(f"{given} is not allowed: it has no field of a line, as in {{question}}")


class DatasetSource(Section):
    """Documents of a dataset of the Hub, by the library `datasets`."""

    dataset: str = Field(description="Name of the dataset, or a folder.")
    tokens: int = Field(gt=0, description="How many tokens to take at most.")
    config: str | None = Field(None, description="Configuration of the dataset.")
    revision: str | None = Field(None, description="Revision of the dataset.")
    split: str = Field("train", description='Split, or a part of one: "train[:1%]".')
    column: str = Field("text", description="Column that has the text.")


class GeneratedSource(Section):
    """Text that the base itself samples, so no data is needed."""

    generated: Literal["chat", "bos"] = Field(
        description="How a document begins: a chat with a user turn that the base makes up, or the first token alone."
    )
    tokens: int = Field(gt=0, description="How many tokens to take at most.")
    documents: int = Field(gt=0, description="How many documents to sample.")
    new_tokens: int = Field(512, gt=0, description="Tokens of a document, or of the answer of a chat, at most.")
    user_tokens: int = Field(64, gt=0, description="Tokens of the user turn of a chat at most.")
    temperature: Number = Field(1.0, gt=0, description="Temperature of the sampling.")
    batch: int = Field(16, gt=0, description="Documents that are sampled at once.")


KINDS = {"file": FileSource, "dataset": DatasetSource, "generated": GeneratedSource}


def _kind(value: Any) -> str | None:
    if isinstance(value, Section):
        return next((name for name, kind in KINDS.items() if isinstance(value, kind)), None)
    return next((name for name in KINDS if isinstance(value, dict) and name in value), None)


Source = Annotated[
    Annotated[FileSource, Tag("file")]
    | Annotated[DatasetSource, Tag("dataset")]
    | Annotated[GeneratedSource, Tag("generated")],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message=f"Input should be a source: it has one of the fields {', '.join(KINDS)}",
    ),
]


def name_of(source: FileSource | DatasetSource | GeneratedSource) -> str:
    """What a source is called in messages and on cards."""
    if isinstance(source, FileSource):
        return source.file
    return source.dataset if isinstance(source, DatasetSource) else f"generated={source.generated!r}"
