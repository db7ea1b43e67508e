"""A chat template is a stranger's program: what it may take, and what is said where it takes more."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.base_models import CHATML, make_tokenizer
from tests.support.commands import ROOT
from training.base.errors import UserError
from training.base.limits import call_limited
from training.data import chat
from training.data.chat import ChatTokenizer, load_chat_tokenizer, user

FOR_HOURS = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = {
    "loops": (FOR_HOURS, "takes longer than"),
    "computes": ("{{ 9 ** (9 ** 9) }}", "takes longer than"),
    "writes gigabytes": ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "wants more than"),
    "doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "wants more than",
    ),
    "asks at once": ("{{ 'a' * 99999999999 }}", "wants more than"),
    "fills": ("{{ '{:>99999999999}'.format(1) }}", "wants more than"),
    "writes much": ("{{ 'a' * 200000 }}", "makes 200,"),
}


def tokenizer_with(template: str, folder: Path) -> ChatTokenizer:
    return load_chat_tokenizer(str(make_tokenizer(folder, ["你好 hello"], template=template)))


def state() -> object:
    return (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.getsignal(signal.SIGPROF),
        signal.getitimer(signal.ITIMER_PROF),
    )


@pytest.mark.parametrize("kind", GREEDY)
def test_a_template_that_takes_too_much_is_refused_by_name(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.3 if "longer" in GREEDY[kind][1] else 5.0)
    template, expected = GREEDY[kind]
    before, began = state(), time.process_time()
    with pytest.raises(UserError, match=rf"the chat template of --tokenizer \S+bad {expected}.*another model"):
        tokenizer_with(template + CHATML, tmp_path / "bad")
    assert time.process_time() - began < 15 and state() == before


def test_one_that_waits_for_its_hour_is_refused_then(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    late = f"{{% if messages[0]['content'] | length > 50 %}}{FOR_HOURS}{{% endif %}}"
    tokenizer = tokenizer_with(late + CHATML, tmp_path / "late")
    assert "你好" in tokenizer.prompt([user("你好")])
    with pytest.raises(UserError, match="takes longer than"):
        tokenizer.prompt([user("你好" * 30)])
    of_systems = f"{{% if messages[0]['role'] == 'system' %}}{FOR_HOURS}{{% endif %}}"
    tokenizer = tokenizer_with(of_systems + CHATML, tmp_path / "systems")
    with pytest.raises(UserError, match="takes longer than"):
        tokenizer.refusal([{"role": "system", "content": "x"}, user("y")])


def test_a_long_conversation_is_no_reason_to_refuse(tmp_path):
    tokenizer = tokenizer_with(CHATML, tmp_path / "good")
    assert len(tokenizer.prompt([user("你" * 3_000_000)])) > 3_000_000


def test_limits_are_as_before_whatever_happens_within():
    before = state()
    assert call_limited(lambda: 7, 1, 1 << 20) == 7 and state() == before
    for function, error in ((lambda: 1 / 0, ZeroDivisionError), (lambda: b"x" * (1 << 36), MemoryError)):
        with pytest.raises(error):
            call_limited(function, 1, 1 << 20)
        assert state() == before
    signal.setitimer(signal.ITIMER_PROF, 1000)
    call_limited(int, 1, 1 << 20)
    left, _ = signal.setitimer(signal.ITIMER_PROF, 0)
    assert left > 900, "somebody else's timer goes on"


def test_what_was_fetched_from_the_hub_says_which_commit_it_is(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert tokenizer_with(CHATML, tmp_path / "snapshots" / commit).about()["commit"] == commit
    assert tokenizer_with(CHATML, tmp_path / "own").about()["commit"] is None


def test_a_call_that_no_limit_can_stop_ends_the_process():
    code = (
        "from training.base.limits import call_limited\n"
        "one, two = [1], [1]\n"
        "for _ in range(60): one, two = [one, one], [two, two]\n"
        "call_limited(lambda: one == two, 0.05, 1 << 30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == -signal.SIGVTALRM


def test_links_in_a_tokenizers_folder_are_not_copied_into_the_data(tmp_path):
    folder = make_tokenizer(tmp_path / "tokenizer", ["什么是合同？", "A contract."])
    (tmp_path / "secret").write_text("a private key")
    (folder / "vocab-notes").symlink_to(tmp_path / "secret")
    load_chat_tokenizer(str(folder)).save(tmp_path / "copy")
    assert "tokenizer.json" in {path.name for path in (tmp_path / "copy").iterdir()}
    assert not (tmp_path / "copy/vocab-notes").exists()
