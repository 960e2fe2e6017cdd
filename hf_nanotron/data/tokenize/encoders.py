"""From rows to tokens: texts, conversations in a chat template, and prompts with their completions."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ...redaction import printable
from .rows import Unreadable
from .tokenizers import ChosenTokenizer

TRAIN_ON = ("replies", "all")
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}  # of ShareGPT


class Encoded(NamedTuple):
    """A document. `trained` says of each id whether it is trained on; None: all are."""

    ids: Sequence[int]
    trained: Sequence[int] | None = None


Result = Encoded | Unreadable | None  # None: there is nothing in the row


class Encoder(Protocol):
    """Encodes rows. It is pickled for other processes."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    masked: bool  # documents say what is trained on

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Result]:
        """One result for each row."""


class TextEncoder:
    """A column of texts, each a document.

    Args:
        column: its name.
        append_eos: the end-of-text token comes behind each document, unless it is there already.
        add_special_tokens: the tokenizer's own post-processing, such as a first token.
    """

    masked = False
    optional: tuple[str, ...] = ()

    def __init__(self, chosen: ChosenTokenizer, column: str, append_eos: bool, add_special_tokens: bool) -> None:
        self.columns: tuple[str, ...] = (column,)
        self.end = _end(chosen) if append_eos else None
        self.special = add_special_tokens
        self._slow = None if getattr(chosen.tokenizer, "is_fast", False) else chosen.tokenizer
        self._fast: Any = None
        if self._slow is None:
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_str(chosen.tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()  # a model that embeds sentences has them in its file
            self._fast.no_padding()

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Result]:
        found: list[Result] = [_text(self.columns[0], record[self.columns[0]]) for record in records]
        texts = [record[self.columns[0]] for record, result in zip(records, found, strict=True) if result is _TEXT]
        if not texts:
            return found
        try:
            every = iter(self._ids(texts))
        except Exception as error:  # a text that is no Unicode, such as half a surrogate pair
            if len(texts) > 1:
                return [result for record in records for result in self.encode([record])]
            return [_refused(error) if result is _TEXT else result for result in found]
        return [self._ended(next(every)) if result is _TEXT else result for result in found]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._slow is not None:
            return self._slow(texts, add_special_tokens=self.special, verbose=False)["input_ids"]
        return [each.ids for each in self._fast.encode_batch_fast(texts, add_special_tokens=self.special)]

    def _ended(self, ids: list[int]) -> Encoded | None:
        if self.end is not None and not (self.special and ids[-1:] == [self.end]):
            ids = [*ids, self.end]
        return Encoded(ids) if ids else None


class _Conversations(ABC):
    """What chats, and prompts with completions, have in common."""

    columns: tuple[str, ...] = ()
    masked = True
    optional: tuple[str, ...] = ("tools", "chat_template_kwargs")

    def __init__(self, chosen: ChosenTokenizer, train_on: str) -> None:
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on={train_on!r} is not one of {', '.join(map(repr, TRAIN_ON))}.")
        self.tokenizer, self.name, self.train_on = chosen.tokenizer, chosen.name or "the tokenizer", train_on

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Result]:
        found: list[Result] = []
        for record in records:
            try:
                found.append(self.encode_one(record))
            except Exception as error:  # a chat template refuses what it does not know, each in its own way
                found.append(_refused(error))
        return found

    @abstractmethod
    def encode_one(self, record: dict[str, Any]) -> Result:
        """One row."""

    def _options(self, record: dict[str, Any]) -> dict[str, Any]:
        tools = record.get("tools")
        if isinstance(tools, str):
            import json

            tools = json.loads(tools)
        return {"tools": tools or None, **(record.get("chat_template_kwargs") or {})}

    def _check_parts(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Refuse contents in parts of a template that does not know them, and writes what Python prints of a list."""
        parted = [(n, text) for n, m in enumerate(messages) if (text := m.get("content")) and isinstance(text, list)]
        if not parted:
            return
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        for number, content in parted:
            if str(content) in whole:
                raise ValueError(
                    f"the content of message {number + 1} has parts, which the chat template of {self.name} does not "
                    "know: make it a text"
                )

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


class ChatEncoder(_Conversations):
    """A column of conversations, each a list of messages with a role and a content, in the tokenizer's chat template.

    With `train_on="replies"`, the messages of the assistant are trained on. Where the template marks them with
    `{% generation %}`, what it marks is. Where it does not, a reply is what the template adds behind the prompt of that
    reply, without blanks behind its last special token. A template that renders earlier messages in another way when
    others follow is refused.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """

    def __init__(self, chosen: ChosenTokenizer, column: str, train_on: str) -> None:
        super().__init__(chosen, train_on)
        self.columns = (column,)
        template = _template(chosen)
        self.is_marked = bool(_MARKER.search(template))

    def encode_one(self, record: dict[str, Any]) -> Result:
        messages = _messages(self.columns[0], record[self.columns[0]])
        if messages is None or isinstance(messages, Unreadable):
            return messages
        options = self._options(record)
        self._check_parts(messages, options)
        if self.train_on == "all":
            ids = self._apply(messages, **options)
            return Encoded(ids, [1] * len(ids))
        if self.is_marked:
            found = self.tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            return Encoded(found["input_ids"], found["assistant_masks"])
        return self._by_prefixes(messages, options)

    def _by_prefixes(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Result:
        def rendered(upto: int, **more: Any) -> str:
            return str(self.tokenizer.apply_chat_template(messages[:upto], tokenize=False, **options, **more))

        whole = rendered(len(messages))
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                return Unreadable("its first message is the assistant's, with no prompt before it")
            before = rendered(number, add_generation_prompt=True)
            after = whole if number + 1 == len(messages) else rendered(number + 1)
            if not (after.startswith(before) and whole.startswith(after)):
                return Unreadable(
                    f"the chat template of {self.name} renders message {number + 1} in another way when others follow, "
                    "and does not mark replies with {% generation %}, so that they cannot be told; use "
                    "train_on='all', or a template with marks"
                )
            spans.append((len(before), len(before) + len(self._without_blanks(after[len(before) :]))))
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        trained, place = [0] * len(found["input_ids"]), 0
        for number, (start, stop) in enumerate(found["offset_mapping"]):
            while place < len(spans) and start >= spans[place][1]:
                place += 1
            if place < len(spans) and stop > spans[place][0]:
                trained[number] = 1
        return Encoded(found["input_ids"], trained)

    def _without_blanks(self, text: str) -> str:
        short = text.rstrip()
        ends = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        return short if short.endswith(tuple(ends)) else text


class PromptCompletionEncoder(_Conversations):
    """The columns `prompt` and `completion`: texts, or lists of messages in the tokenizer's chat template.

    With `train_on="replies"`, what comes behind the tokens that the prompt alone has is trained on. That is TRL's rule
    (`SFTTrainer`, 1.16), and as there, texts get the tokenizer's special tokens, and the end-of-text token behind them.
    """

    columns: tuple[str, ...] = ("prompt", "completion")

    def __init__(self, chosen: ChosenTokenizer, train_on: str, append_eos: bool, add_special_tokens: bool) -> None:
        super().__init__(chosen, train_on)
        self.special = add_special_tokens
        self.end = chosen.eos_token if append_eos and _end(chosen) is not None else None
        self._chosen = chosen

    def encode_one(self, record: dict[str, Any]) -> Result:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            return self._of_messages(record)
        for name, value in (("prompt", prompt), ("completion", completion)):
            if (found := _text(name, value)) is not _TEXT and not (name == "prompt" and value == ""):
                return found
        if self.end is not None and not completion.endswith(self.end):
            completion += self.end
        first, whole = (
            self.tokenizer(text, add_special_tokens=self.special, verbose=False)["input_ids"]
            for text in (prompt, prompt + completion)
        )
        return self._split(first, whole)

    def _of_messages(self, record: dict[str, Any]) -> Result:
        _template(self._chosen)
        prompt, completion = (_messages(name, record[name]) for name in self.columns)
        for part in (prompt, completion):
            if part is None or isinstance(part, Unreadable):
                return part
        assert isinstance(prompt, list) and isinstance(completion, list)
        options = self._options(record)
        self._check_parts(prompt + completion, options)
        first = self._apply(prompt, add_generation_prompt=True, **options)
        return self._split(first, self._apply(prompt + completion, **options))

    def _split(self, prompt: Sequence[int], whole: Sequence[int]) -> Encoded:
        if self.train_on == "all":
            return Encoded(whole, [1] * len(whole))
        pairs = zip(prompt, whole, strict=False)
        common = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(whole)))
        return Encoded(whole, [0] * common + [1] * (len(whole) - common))


_TEXT = Encoded(())  # stands for a text that can be encoded


def _text(column: str, value: Any) -> Result:
    """Whether a value is text with something in it."""
    if isinstance(value, str):
        return _TEXT if value else None
    return None if value is None else Unreadable(f"its {column} is {_kind(value)}, not text")


def _messages(column: str, value: Any) -> list[dict[str, Any]] | Unreadable | None:
    """A conversation, with ShareGPT's names of things changed to those of chat templates."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        return Unreadable(f"its {column} is {_kind(value)}, not a list of messages")
    messages = []
    for number, message in enumerate(value):
        if isinstance(message, dict) and "from" in message and "value" in message:
            role = str(message["from"])
            message = {"role": _ROLES.get(role, role), "content": message["value"]}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Unreadable(f"message {number + 1} of its {column} has no role")
        messages.append(message)
    return messages


def _template(chosen: ChosenTokenizer) -> str:
    try:
        return str(chosen.tokenizer.get_chat_template())
    except ValueError as error:
        raise ValueError(
            f"{chosen.name or 'the tokenizer'} has no chat template that conversations could be written in: use the "
            "tokenizer of a model for chats, or set tokenizer.chat_template."
        ) from error


def _end(chosen: ChosenTokenizer) -> int:
    if chosen.eos_token_id is None:
        raise ValueError(
            f"{chosen.name or 'the tokenizer'} has no end-of-text token to put behind documents: name one with "
            "eos_token, or use append_eos=False."
        )
    return chosen.eos_token_id


def _refused(error: Exception) -> Unreadable:
    return Unreadable(f"it cannot be tokenized ({printable(' '.join(str(error).split()))[:300]})")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__} ({str(value)[:40]!r})"
