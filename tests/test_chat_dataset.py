"""Conversations as packed rows: what is trained on, by hand and as TRL does it, in a mixture, and what is refused."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pool import WorkerPool
from test_cli import command, one_line
from token_files import documents, write_ds
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_nanotron.data import ChatDataset, Mixture, TokenDataset, TokenFile, tokenize_corpus

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else '...' }}")
CHATS = [
    [("user", "Hi"), ("assistant", "Hello!")],
    [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "Yes, 4.\n")],
    [("user", "a"), ("assistant", "b")],
    [("user", "Tell me a story of a very long way that goes on and on"), ("assistant", "Once upon a time. " * 9)],
    *([("user", "q" * n), ("assistant", "a" * (n % 7 + 1))] for n in range(1, 30)),
]


@functools.cache
def alphabet() -> Tokenizer:
    """A token for each byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=alphabet(), eos_token=SPECIAL[0], chat_template=template)


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def chats() -> Dataset:
    return Dataset.from_dict({"messages": [messages(chat) for chat in CHATS]})


def pairs(conversational: bool = False) -> Dataset:
    found: dict[str, list[Any]] = {"prompt": [], "completion": []}
    for chat in CHATS:
        found["prompt"].append(messages(chat[:-1]) if conversational else f"{chat[-2][1]} = ")
        found["completion"].append(messages(chat[-1:]) if conversational else chat[-1][1])
    return Dataset.from_dict(found)


def written(folder: Path, source: Any, chosen: Any, **options: Any) -> list[tuple[list[int], list[int]]]:
    """Documents, and what of each is trained on."""
    done = tokenize_corpus(source, folder, chosen, progress=False, **options)
    found = []
    for name in done.files:
        file = TokenFile.open(str(folder / name))
        assert file.documents is not None
        edges = file.documents.edges(0, file.documents.count).tolist()
        loss = file.read_loss(0, file.tokens)
        assert loss is not None
        for a, b in zip(edges, edges[1:], strict=False):
            found.append((file.read(a, b).tolist(), loss[a:b].tolist()))
    return found


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "marked"])
def test_replies_are_trained_on(tmp_path: Path, template: str) -> None:
    """The texts of the trained runs are the replies with their end, whether or not the template marks them."""
    chosen = tokenizer(template)
    found = written(tmp_path / "out", chats(), chosen, kind="chat")
    assert len(found) == len(CHATS)
    for chat, (ids, trained) in zip(CHATS, found, strict=True):
        assert chosen.decode(ids) == chosen.apply_chat_template(messages(chat), tokenize=False)
        runs = np.split(np.array(ids), np.flatnonzero(np.diff(trained)) + 1)[1::2]
        assert [chosen.decode(run) for run in runs] == [
            f"{text}<|im_end|>" for role, text in chat if role == "assistant"
        ]
    everything = written(tmp_path / "all", chats(), chosen, kind="chat", train_on="all")
    assert [ids for ids, _ in everything] == [ids for ids, _ in found]
    assert all(all(trained) for _, trained in everything)


def test_what_is_prepared_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a source and loading a tokenizer may take seconds, on every rank."""
    from hf_nanotron.data.tokenize import corpus

    chosen: list[Any] = []
    choose = corpus.choose_tokenizer
    monkeypatch.setattr(corpus, "choose_tokenizer", lambda *args: chosen.append(args) or choose(*args))
    rows = Dataset.from_list([{"messages": messages(chat)} for chat in CHATS[:3]])
    sets = [ChatDataset(rows, tokenizer(), 64, cache_dir=tmp_path) for _ in range(2)]
    assert len(chosen) == 2 and len(list(tmp_path.iterdir())) == 1
    assert sets[0].identity() == sets[1].identity() and sets[0].vocabulary is not None


def test_prompts_and_completions(tmp_path: Path) -> None:
    chosen = tokenizer()
    for conversational in (False, True):
        source = pairs(conversational)
        found = written(tmp_path / str(conversational), source, chosen, kind="prompt_completion")
        for chat, (ids, trained) in zip(CHATS, found, strict=True):
            first = trained.index(1)
            assert not any(trained[:first]) and all(trained[first:])
            prompt, completion = chosen.decode(ids[:first]), chosen.decode(ids[first:])
            if conversational:
                assert prompt == chosen.apply_chat_template(
                    messages(chat[:-1]), tokenize=False, add_generation_prompt=True
                )
                assert completion == f"{chat[-1][1]}<|im_end|>\n"
            else:
                assert (prompt, completion) == (f"{chat[-2][1]} = ", f"{chat[-1][1]}<|endoftext|>")


def test_names_of_sharegpt_tools_and_empty_rows(tmp_path: Path) -> None:
    chosen = tokenizer(PLAIN.replace("{% for m", "{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}{% for m", 1))
    rows = [
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
            "tools": [{"name": "add"}],
        },
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
            "tools": '[{"name": "sub"}]',
        },
        {"conversations": []},
        {"conversations": None},
        {"conversations": [{"from": "human", "value": "nobody answers"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = written(tmp_path / "out", path, chosen, kind="chat", column="conversations")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert [chosen.decode(ids) for ids, _ in found] == [f"[add]{text}", f"[sub]{text}"]
    counts = tokenize_corpus(path, tmp_path / "out", chosen, kind="chat", column="conversations", progress=False).counts
    assert counts is not None and (counts.empty, counts.untrained) == (2, 1)


# ---- as TRL does ----


@pytest.mark.parametrize("case", ["chat", "marked", "prompts", "conversations"])
@pytest.mark.parametrize("length", [1000, 60])
def test_tokens_and_labels_are_those_of_trl(tmp_path: Path, case: str, length: int) -> None:
    """Of its SFTTrainer's preparation, without packing; rows come in one order."""
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="trl is not installed")
    chosen = tokenizer(MARKED)
    source = {"chat": chats(), "marked": chats(), "prompts": pairs(), "conversations": pairs(True)}[case]
    trainer = SimpleNamespace(
        _tokenizer=chosen, chat_template=None, completion_only_loss="messages" not in source.column_names
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=case == "marked",
        max_length=length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    theirs = sft.SFTTrainer._prepare_dataset(trainer, source, chosen, args, False, None, "train")
    ours = written(
        tmp_path / "out",
        source,
        chosen,
        kind="chat" if "messages" in source.column_names else "prompt_completion",
        train_on="all" if case == "chat" else "replies",
        max_length=length,
    )
    assert [ids for ids, _ in ours] == theirs["input_ids"]
    assert [[t if kept else -100 for t, kept in zip(*pair, strict=True)] for pair in ours] == theirs["labels"]


@pytest.mark.parametrize(("too_long", "strategy"), [("truncate", "bfd"), ("split", "bfd_split")])
def test_packing_is_as_dense_as_trls(tmp_path: Path, too_long: Any, strategy: str) -> None:
    """As many rows, of the same pieces of conversations."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    chosen, length = tokenizer(), 90
    tokens = written(tmp_path / "whole", chats(), chosen, kind="chat")
    table = {"input_ids": [ids for ids, _ in tokens], "labels": [ids for ids, _ in tokens]}
    theirs = trl.pack_dataset(Dataset.from_dict(table), length, strategy)
    ours = ChatDataset(chats(), chosen, length, too_long=too_long, cache_dir=tmp_path / "cache")
    assert len(ours) == len(theirs)
    rows = ours.rows(range(len(ours)))
    found = [
        piece
        for ids, positions in zip(rows["input_ids"], rows["position_ids"], strict=True)
        for piece in np.split(ids, np.flatnonzero(positions == 0)[1:])
    ]
    packed = [ids for row in theirs for ids in np.split(np.array(row["input_ids"]), np.cumsum(row["seq_lengths"])[:-1])]
    assert sorted(p.tolist() for p in found if p.any()) == sorted(p.tolist() for p in packed)


# ---- the dataset ----


def test_rows(tmp_path: Path) -> None:
    """Each conversation once, its prompts without labels; the loss of a row is that of its conversations alone."""
    chosen, length = tokenizer(), 128
    tokens = written(tmp_path / "whole", chats(), chosen, kind="chat", max_length=length)
    dataset = ChatDataset(chats(), chosen, length, cache_dir=tmp_path / "cache", seed=3)
    assert dataset.columns == ("input_ids", "labels", "shift_labels", "position_ids")
    rows = dataset.rows(range(len(dataset)))
    found = []
    for number in range(len(dataset)):
        starts = [*np.flatnonzero(rows["position_ids"][number] == 0).tolist(), length]
        for a, b in zip(starts, starts[1:], strict=False):
            ids, labels, shifted = (rows[name][number, a:b] for name in ("input_ids", "labels", "shift_labels"))
            np.testing.assert_array_equal(shifted[:-1], labels[1:])
            assert shifted[-1] == labels[0] == -100
            if ids.any():
                found.append((ids.tolist(), (labels != -100).astype(int).tolist()))
    assert sorted(found) == sorted(tokens)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    row = {name: torch.from_numpy(column[:1]) for name, column in rows.items()}
    with torch.no_grad():
        ours = float(model(**row, use_cache=False).loss)
        total, count = 0.0, 0
        starts = [*np.flatnonzero(rows["position_ids"][0] == 0).tolist(), length]
        for a, b in zip(starts, starts[1:], strict=False):
            labels = row["labels"][:, a:b]
            if trained := int((labels[:, 1:] != -100).sum()):
                total += float(model(input_ids=row["input_ids"][:, a:b], labels=labels).loss) * trained
                count += trained
    assert count > 10 and math.isclose(ours, total / count, rel_tol=1e-5)


def test_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokenized once for the same source, tokenizer and arguments; made again, it is the same set."""
    first = ChatDataset(chats(), tokenizer(), 64, cache_dir=tmp_path)
    assert "the end of 2 documents longer than max_length was left out" in caplog.text
    (file,) = tmp_path.glob("*/*.ds")
    at = file.stat().st_mtime_ns
    again = ChatDataset(chats(), tokenizer(), 64, cache_dir=tmp_path)
    assert file.stat().st_mtime_ns == at and again.identity() == first.identity()
    assert TokenDataset(file, 64, documents="pack").identity() != first.identity() and first.name == "chat"
    shutil.rmtree(tmp_path / file.parent.name)
    anew = ChatDataset(chats(), tokenizer(), 64, cache_dir=tmp_path)
    assert anew.identity() == first.identity()
    np.testing.assert_array_equal(anew.rows(range(9))["labels"], first.rows(range(9))["labels"])
    for other in (
        ChatDataset(chats(), tokenizer(), 64, cache_dir=tmp_path, train_on="all"),
        ChatDataset(chats(), tokenizer(MARKED), 64, cache_dir=tmp_path),
        ChatDataset(chats().select(range(9)), tokenizer(), 64, cache_dir=tmp_path),
        ChatDataset(chats(), tokenizer(), 64, cache_dir=tmp_path, too_long="drop"),
    ):
        assert other.identity()["files"] != first.identity()["files"]
    assert "2 documents longer than max_length were left out" in caplog.text
    assert len(list(tmp_path.iterdir())) == 5


def made_on_a_rank(folder: str) -> tuple[dict[str, Any], list[int]]:
    dataset = ChatDataset(f"{folder}/chats.jsonl", f"{folder}/tokenizer", 64, cache_dir=f"{folder}/cache")
    return dataset.identity(), [path.stat().st_mtime_ns for path in Path(folder).glob("cache/*/*.ds")]


def test_ranks_share_a_cache(pool: WorkerPool, tmp_path: Path) -> None:
    """The first one writes it, the others wait and read it."""
    chats().to_json(tmp_path / "chats.jsonl")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    found = pool.run(3, made_on_a_rank, str(tmp_path))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 1
    in_memory = ChatDataset(chats(), f"{tmp_path}/tokenizer", 64, cache_dir=tmp_path / "other")
    assert in_memory.identity() == found[0][0]  # of the contents alone


def test_in_a_mixture(tmp_path: Path) -> None:
    write_ds(tmp_path / "web.ds", documents(200))
    web = TokenDataset(tmp_path / "web.ds", 64, token_size=2, documents="mask")
    chat = ChatDataset(chats(), tokenizer(), 64, cache_dir=tmp_path / "cache")
    mixture = Mixture({"web": web, "chat": chat}, {"web": 0.5, "chat": 0.5})
    rows = mixture.rows(range(10))
    assert rows["domain"].tolist() == [0, 1] * 5 and rows["position_ids"].shape == (10, 64)
    np.testing.assert_array_equal(rows["labels"][1::2], chat.rows(range(5))["labels"])
    assert mixture.state_dict(10)["counts"] == {"web": 5, "chat": 5}


@pytest.mark.parametrize("kind", ["messages", "conversations", "prompts"])
def test_the_kind_is_found(tmp_path: Path, kind: str) -> None:
    source = (
        pairs() if kind == "prompts" else chats().rename_column("messages", kind) if kind != "messages" else chats()
    )
    source.to_parquet(tmp_path / "a.parquet")
    from_files = ChatDataset(tmp_path / "a.parquet", tokenizer(), 64, cache_dir=tmp_path / "cache")
    told = {"kind": "prompt_completion"} if kind == "prompts" else {"kind": "chat", "column": kind}
    plain = ChatDataset(source, tokenizer(), 64, cache_dir=tmp_path / "cache", **told)  # type: ignore[arg-type]
    np.testing.assert_array_equal(from_files.rows(range(8))["labels"], plain.rows(range(8))["labels"])


# ---- refusals ----


def test_refusals(tmp_path: Path) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (chats(), tokenizer(None), {}, "has no chat template that conversations could be written in"),
        (pairs(True), tokenizer(None), {}, "has no chat template that conversations could be written in"),
        (
            chats(),
            tokenizer(FORGETFUL),
            {},
            "row 0: the chat template of .* renders message 2 in another way when others",
        ),
        (chats(), tokenizer(), {"train_on": "last"}, "train_on='last' is not one of 'replies', 'all'"),
        (chats(), tokenizer(), {"too_long": "keep"}, "too_long='keep' is not one of"),
        (chats(), tokenizer(), {"kind": "text"}, "kind='text' is not 'chat' or 'prompt_completion'"),
        (chats(), tokenizer(), {"add_special_tokens": True}, "add_special_tokens has no effect on conversations"),
        (pairs(), tokenizer(), {"kind": "prompt_completion", "column": "a"}, "column='a': prompts and completions"),
        (Dataset.from_dict({"text": ["a"]}), tokenizer(), {}, "has neither messages or conversations nor prompt"),
        (Dataset.from_dict({"messages": ["a"]}), tokenizer(), {}, r"row 0: its messages is a str \('a'\), not a list"),
        (
            Dataset.from_dict({"messages": [[{"content": "a"}]]}),
            tokenizer(),
            {},
            "row 0: message 1 of its messages has no role",
        ),
        (
            Dataset.from_dict({"messages": [messages([("assistant", "a")])]}),
            tokenizer(),
            {},
            "row 0: its first message is the assistant's",
        ),
        (
            Dataset.from_dict({"prompt": ["a"], "completion": [3]}),
            tokenizer(),
            {},
            r"row 0: its completion is a int \('3'\)",
        ),
        (
            Dataset.from_dict({"messages": [messages([("user", "a")])]}),
            tokenizer(),
            {},
            "has no document: 1 documents without a token to train on were left out",
        ),
    ]
    for source, chosen, options, match in cases:
        with pytest.raises(ValueError, match=match):
            ChatDataset(source, chosen, 64, **{**cache, **options})


def test_messages_of_a_table_are_those_of_lines(tmp_path: Path) -> None:
    """Arrow fills fields that one message lacks with nulls; templates ask whether they are there."""
    template = PLAIN.replace(
        "{{ m['content'] }}",
        "{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for part in m['content'] %}[{{ part | list | join(',') }}]{% endfor %}{% endif %}"
        "{% if 'tool_calls' in m %}<{{ m['tool_calls'][0]['arguments'] | list | join(',') }}>{% endif %}",
    )
    calls = [[{"arguments": {name: 1}}] for name in "ab"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                *({"role": "assistant", "content": "", "tool_calls": call} for call in calls),
                {"role": "assistant", "content": "x"},
            ]
        },
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    chosen = tokenizer(template)
    lines, *others = (
        written(tmp_path / f"out{number}", source, chosen, kind="chat")
        for number, source in enumerate((tmp_path / "a.jsonl", tmp_path / "a.parquet", Dataset.from_list(rows)))
    )
    assert chosen.decode(lines[0][0]).count("<a>") == chosen.decode(lines[0][0]).count("<b>") == 1
    assert others == [lines, lines]
    parts = [{"type": "image", "url": "u"}, {"type": "text", "text": "t"}]
    chat = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    (tmp_path / "parts.jsonl").write_text(json.dumps(chat))
    found = written(tmp_path / "parts", tmp_path / "parts.jsonl", chosen, kind="chat")
    assert "[type,url][type,text]" in chosen.decode(found[0][0])
    with pytest.raises(ValueError, match="content of message 1 has parts, which the chat template of .* does not know"):
        written(tmp_path / "unknown", tmp_path / "parts.jsonl", tokenizer(), kind="chat")


def test_command(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    chats().to_parquet(tmp_path / "chats.parquet")
    pairs().to_json(tmp_path / "pairs.jsonl")
    for source, option, more in (
        ("chats.parquet", "--chat", []),
        ("pairs.jsonl", "--prompt-completion", ["--max-length=50"]),
    ):
        out = tmp_path / option
        argv = [
            "tokenize",
            option,
            f"{tmp_path}/{source}",
            str(out),
            "--tokenizer",
            f"{tmp_path}/tokenizer",
            "--workers=1",
        ]
        code, said, _ = command(*argv, *more)
        assert code == 0 and " documents, " in said
        dataset = TokenDataset(out, 64, documents="pack")
        assert dataset.files[0].loss is not None and (dataset.rows([0])["labels"] != -100).any()
    argv = [
        "tokenize",
        f"{tmp_path}/pairs.jsonl",
        f"{tmp_path}/x",
        "--tokenizer",
        f"{tmp_path}/tokenizer",
        "--workers=1",
    ]
    assert "line 1: it has no column 'messages'; it has prompt, completion" in one_line(command(*argv, "--chat"))
