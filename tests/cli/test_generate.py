"""``generate``: prompts, streamed texts, JSON, conversations, and an end at any moment."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from qsparse_moe.cli.app import run
from qsparse_moe.cli.generate import check_prompt, read_prompts
from qsparse_moe.cli.generated_text import _Printer
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.cached_model import TorchDecode
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.sampling import Sampling
from qsparse_moe.interop.state_dict import export_run
from qsparse_moe.sparsity.plan import SparsityPlan
from qsparse_moe.training.interrupt import Stopped, until_stopped
from qsparse_moe.training.loop import train
from tests.data.test_tokenizer import save_tokenizer
from tests.support.runs import tiny_config, write_text

torch.set_num_threads(1)
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("verb") / "text").parent


@pytest.fixture(scope="module")
def run_dir(folder):
    return train(tiny_config(folder, "run", engine="torch", steps=4)).run_dir


def said(capsys, *arguments):
    assert run(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    assert run(["generate", *map(str, arguments)]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_text_is_printed_after_its_prompt_and_ends_with_a_line(run_dir, capsys):
    generated = Generator.load(run_dir).generate("abc", max_tokens=9)[0]
    assert said(capsys, run_dir, "--prompt", "abc", "--max-tokens", "9") == f"abc{generated.text}\n"


def test_one_prompt_gives_one_json_object(run_dir, capsys):
    content = json.loads(said(capsys, run_dir, "--prompt", "abc", "--max-tokens", "9", "--json"))
    generated = Generator.load(run_dir).generate("abc", max_tokens=9)[0]
    assert content == {
        "run_dir": str(run_dir),
        "step": 4,
        "prompt": "abc",
        "text": generated.text,
        "num_tokens": 9,
        "stop_reason": "max_tokens",
        "token_ids": list(generated.token_ids),
        "log_probabilities": list(generated.log_probabilities),
    }


def test_several_prompts_are_printed_in_order_or_one_json_line_each(run_dir, tmp_path, capsys):
    prompts = ["a", "bcd", "", "ef gh", "b"]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    options = ["--max-tokens", "7", "--temperature", "1", "--seed", "3", "--batch-size", "2"]
    lines = said(capsys, run_dir, "--prompts-file", tmp_path / "prompts.txt", "--json", *options).splitlines()
    found = {one["index"]: one for one in map(json.loads, lines)}
    assert [found[i]["prompt"] for i in range(5)] == prompts
    made = Generator.load(run_dir)
    for index, prompt in enumerate(prompts):
        alone = made.generate(prompt, max_tokens=7, sampling=Sampling(temperature=1.0), seed=3 + index)[0]
        assert found[index]["token_ids"] == list(alone.token_ids)
    repeated = [word for prompt in prompts for word in ("--prompt", prompt)]
    texts = said(capsys, run_dir, *repeated, *options)
    assert texts == "\n\n".join(prompt + found[i]["text"] for i, prompt in enumerate(prompts)) + "\n"


def test_options_reach_the_generator(run_dir, capsys, monkeypatch):
    seen = {}
    stream = Generator.stream
    monkeypatch.setattr(Generator, "stream", lambda self, prompts, **s: (seen.update(s), stream(self, prompts, **s))[1])
    options = ["--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.2", "--temperature", "2"]
    said(capsys, run_dir, *options, "--stop", "x", "--stop", "yz", "--max-tokens", "3", "--seed", "4")
    assert seen == {
        "max_tokens": 3,
        "sampling": Sampling(temperature=2.0, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
        "seed": 4,
        "stop": ("x", "yz"),
        "reuse": None,
        "stop_tokens": (),
    }


def test_a_stop_string_ends_the_text_before_it(run_dir, capsys):
    whole = json.loads(said(capsys, run_dir, "--max-tokens", "30", "--json"))["text"]
    stop = whole[8:10]
    content = json.loads(said(capsys, run_dir, "--max-tokens", "30", "--json", "--stop", stop))
    assert (content["text"], content["stop_reason"]) == (whole[: whole.index(stop)], "stop_string")


def test_an_export_generates_and_weights_and_plan_change_its_text(run_dir, tmp_path, capsys):
    export_run(run_dir, tmp_path / "out")
    options = ["--prompt", "ab", "--max-tokens", "6", "--json"]
    read = lambda *more: json.loads(said(capsys, *more, *options))["log_probabilities"]  # noqa: E731
    SparsityPlan.uniform(Generator.load(run_dir).config.model, 0.9).save(tmp_path / "plan.json")
    found = read(run_dir)
    assert read(tmp_path / "out") == found == read(run_dir, "--engine", "torch")
    assert read(run_dir, "--plan", tmp_path / "plan.json") != found != read(run_dir, "--weights", "bf16")


def test_the_speed_is_reported_beside_the_text(run_dir, capsys):
    words = ["--prompt", "abc", "--max-tokens", "5", "--stats", "--engine", "torch"]
    assert run(["generate", str(run_dir), *words]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("abc") and "tokens/s" not in printed.out
    lines = {line.split("  ")[0]: line for line in printed.err.splitlines()}
    assert lines["engine"].split()[-1] == "torch"
    assert " 4 tokens in " in lines["prefill"] and " 4 tokens in " in lines["decode"]
    assert lines["decode"].endswith("tokens/s") and lines["key-value cache"].endswith(" bytes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "ab" * 20], "--prompt (41 tokens, with the one that begins a document where it is a text) must "
         "be at most --max-length (24) tokens long; shorten it, raise --max-length, or set --overlong to truncate"),
        (["--prompt", "a", "--prompt", "ab" * 20], "--prompt number 2 (41 tokens"),
        (["--engine", "fast"], "--engine ('fast') must be one of auto, "),
        (["--device", "cpu", "--weights", "int3"], "--weights ('int3') must be one of auto, fp32"),
        (["--head", "int{3}"], "--head ('int{3}') must be one of auto, fp32, bf16, int8"),
        (["--engine", "torch", "--rows", "selected"], "--rows ('selected') must be all or auto with the engine torch"),
        (["--weights", "ternary"], "--weights (ternary) must be those of a model that was trained"),
        (["--head", "fp32", "--weights", "bf16"], "--head (fp32) must be auto, bf16, or int8 where the model itself is "
         "in bf16, because fp32 would hold the same values in twice the bytes; leave it out, or add --weights fp32"),
        (["--top-k", "5", "--min-p", "0.1"], "--top-k and --min-p must be left out at --temperature 0, which takes the "
         "likeliest token; set a --temperature above 0 to draw"),
        (["--top-p", "0", "--temperature", "1"], "--top-p (0.0) must lie in (0, 1]"),
        (["--repetition-penalty", "0"], "--repetition-penalty (0.0) must be positive"),
        (["--seed", str(2**63)], f"--seed ({2**63}) must lie from 0 to 2^63 - 1"),
        (["--max-tokens", str(10**12), "--max-length", str(10**12)], "--prompt (1 in one batch, with up to "
         "1000000000000 tokens each) need about "),
        (["--stop", "{", "--stop", ""], "--stop (['{', '']) must hold strings"),
        (["--prompt", "a", "--prompts-file", "b"], "--prompt and --prompts-file both give prompts; keep one"),
        (["--prompts-file", "missing.txt"], "--prompts-file (missing.txt) cannot be read"),
        (["--interactive", "--json"], "--interactive reads its prompts from the terminal"),
        (["--interactive", "--prompt", "a"], "--interactive reads its prompts from the terminal"),
        (["--plan", "missing.json"], "missing.json"),
        (["--truncate-prompt", "--overlong", "slide"], "--truncate-prompt and --overlong slide both treat prompts"),
    ],
)  # fmt: skip
def test_impossible_requests_are_refused_with_one_message(run_dir, capsys, arguments, message):
    assert message in refusal(capsys, run_dir, *arguments)


def test_every_prompt_of_every_batch_is_checked_before_the_first_is_generated(run_dir, capsys):
    prompts = ["--prompt", "a", "--prompt", "b" * 24]
    assert run(["generate", str(run_dir), *prompts, "--batch-size", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "(25 tokens" in printed.err


def test_a_prompt_of_a_file_is_named_by_its_line_in_every_batch(run_dir, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n" + "c" * 24 + "\n")
    for size in ("1", "2", "8"):
        message = refusal(capsys, run_dir, "--prompts-file", file, "--batch-size", size)
        assert f"line 3 of --prompts-file {file} (25 tokens" in message


def test_python_callers_read_the_names_of_arguments(run_dir):
    with pytest.raises(ConfigError, match=r"^prompts\[1\] \(41 tokens.* at most max_length \(24\).* set overlong to"):
        Generator.load(run_dir).stream(["a", "ab" * 20])


def test_a_plan_of_another_model_is_refused(run_dir, tmp_path, capsys):
    config = Generator.load(run_dir).config.model.model_copy(update={"num_layers": 1})
    file = tmp_path / "plan.json"
    SparsityPlan.uniform(config, 0.5).save(file)
    assert f"{file}: sparsity plan: layer 1, " in refusal(capsys, run_dir, "--plan", file)


def test_overlong_prompts_are_cut_or_slide_on_request(run_dir, capsys):
    prompt = ["--prompt", "abcdefgh" * 4, "--max-tokens", "3"]
    cut = said(capsys, run_dir, *prompt, "--truncate-prompt")
    assert cut.startswith("abcdefgh" * 3) and cut == said(capsys, run_dir, *prompt, "--overlong", "truncate")
    assert said(capsys, run_dir, *prompt, "--overlong", "slide").startswith("abcdefgh" * 4)
    assert said(capsys, run_dir, *prompt, "--max-length", "40").startswith("abcdefgh" * 4)


def test_a_prompt_that_is_not_utf_8_is_named_with_the_offending_byte():
    check_prompt("né €")
    prompt = "né".encode() + b"caf\xe9!"
    with pytest.raises(ConfigError, match=r"--prompt \('n\\xe9caf\\udce9!'\) must be UTF-8, and its byte 6 is not"):
        check_prompt(prompt.decode("utf-8", errors="surrogateescape"))


def test_a_file_of_prompts_must_be_text_and_have_a_line(tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match=r"prompts\) cannot be read \('utf-8' codec .*one prompt per line"):
        read_prompts([], file)
    file.write_text("")
    with pytest.raises(ConfigError, match=r"prompts\) is empty; it must have one prompt per line"):
        read_prompts([], file)
    file.write_text("one\n\n two\f2\u2028\n\n")
    assert read_prompts([], file) == ["one", "", " two\f2\u2028", ""]


def test_texts_of_a_batch_are_written_in_turn_and_the_first_is_streamed():
    written = []
    with _Printer(["A", "B", "C"], is_last=True, write=written.append) as printer:
        printer.add(1, "x", is_end=True)
        assert "".join(written) == "A"
        printer.add(0, "y", is_end=False)
        assert "".join(written) == "Ay"
        printer.add(2, "z", is_end=False)
        printer.add(0, "", is_end=True)
        assert "".join(written) == "Ay\n\nBx\n\nCz"
        printer.add(2, "", is_end=True)
    assert "".join(written) == "Ay\n\nBx\n\nCz\n"


def test_a_stop_signal_leaves_the_written_text_and_ends_with_its_code(run_dir, capsys, monkeypatch):
    decode, calls = TorchDecode.decode, []

    def interrupted(self, tokens_B, cache):
        calls.append(tokens_B)
        if len(calls) == 4:
            raise Stopped(signal.SIGINT)
        return decode(self, tokens_B, cache)

    arguments = ["generate", str(run_dir), "--prompt", "ab", "--prompt", "cd", "--engine", "torch"]
    expected = [one.text for one in Generator.load(run_dir, engine="torch").generate(["ab", "cd"], max_tokens=4)]
    monkeypatch.setattr(TorchDecode, "decode", interrupted)
    assert until_stopped(lambda: run([*arguments, "--max-tokens", "20"])) == 130
    printed = capsys.readouterr()
    assert printed.out == f"ab{expected[0]}\n\ncd{expected[1]}\n"
    assert printed.err.splitlines()[-1] == "error: stopped by Ctrl-C" and "Traceback" not in printed.err


@pytest.mark.distributed
def test_ctrl_c_ends_the_program_cleanly(run_dir):
    process = subprocess.Popen(
        [sys.executable, "-m", "qsparse_moe", "generate", str(run_dir), "--prompt", "ab", "--max-tokens", "1000000"],
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    first = b""
    while len(first) < 4:  # the prompt and some of the text
        first += os.read(process.stdout.fileno(), 4)
    process.send_signal(signal.SIGINT)
    rest, said_on_error = process.communicate(timeout=60)
    assert process.returncode == 130
    printed = (first + rest).decode("utf-8")
    assert printed.startswith("ab") and printed.endswith("\n")
    assert said_on_error.decode().splitlines()[-1] == "error: stopped by Ctrl-C" and b"Traceback" not in said_on_error


@pytest.mark.distributed
def test_text_is_generated_where_nothing_can_be_compiled(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    process = subprocess.run(
        [sys.executable, "-m", "qsparse_moe", "generate", str(run_dir), "--prompt", "ab", "--max-tokens", "3"],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "file")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert process.stdout.startswith("ab") and process.stdout.endswith("\n")
    said_on_error = " ".join(process.stderr.split())
    assert "engine=auto: native cannot be built" in said_on_error and "(TORCH_EXTENSIONS_DIR) failed" in said_on_error


def conversation(monkeypatch, capsys, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return said(capsys, "--interactive", *arguments)


def test_without_a_template_the_user_and_the_model_continue_one_text(run_dir, capsys, monkeypatch):
    printed = conversation(monkeypatch, capsys, ["ab", "cd"], run_dir, "--max-tokens", "5")
    made = Generator.load(run_dir)
    start = [256, *b"ab"]
    first = made.generate(start, max_tokens=5)[0]
    second = made.generate([*start, *first.token_ids, *b"cd"], max_tokens=5)[0]
    assert printed == f"{first.text}\n{second.text}\n"


def test_a_turn_of_a_conversation_computes_only_what_follows_the_turns_before(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\ncd\n"))
    assert run(["generate", "--interactive", str(run_dir), "--max-tokens", "5", "--stats"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prefill")]
    # The document token and two bytes; then the last token of the answer and two bytes.
    assert [" ".join(line.split()[:3]) for line in lines] == ["prefill 3 tokens", "prefill 3 tokens"]


def test_a_long_conversation_keeps_its_last_tokens_and_a_long_line_is_refused(run_dir, capsys, monkeypatch):
    assert len(conversation(monkeypatch, capsys, ["abcdefgh"] * 5, run_dir, "--max-tokens", "5").splitlines()) == 5
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 25 + "\n"))
    assert "the line (25 tokens" in refusal(capsys, run_dir, "--interactive")


@pytest.fixture(scope="module")
def chat_run(folder):
    words = ["</s>", "<unk>", "user", "assistant", *sorted({w for f in (folder / "text").iterdir()
                                                            for w in f.read_text().split()})]  # fmt: skip
    tokenizer = save_tokenizer(
        folder / "words", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>", "chat_template": TEMPLATE}
    )
    config = tiny_config(folder, "chat", engine="torch", steps=1, model={"vocab_size": None})
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    return train(config).run_dir, words


def test_a_chat_template_writes_the_turns(chat_run, capsys, monkeypatch):
    run_dir, words = chat_run
    made = Generator.load(run_dir)
    printed = conversation(monkeypatch, capsys, [words[5], words[6]], run_dir, "--max-tokens", "3")
    start = [2, 5, 0, 3]
    first = made.generate(start, max_tokens=3)[0]
    reply = [words.index(word) for word in first.text.split()]
    second = made.generate([2, 5, 0, 3, *reply, 0, 2, 6, 0, 3], max_tokens=3)[0]
    assert printed == f"{first.text}\n{second.text}\n"


def test_the_oldest_turns_are_left_out_of_a_long_chat(chat_run, capsys, monkeypatch):
    run_dir, words = chat_run
    lines = conversation(monkeypatch, capsys, [words[5]] * 8, run_dir, "--max-tokens", "3", "--max-length", "12")
    assert len(lines.splitlines()) == 8


def test_a_template_that_fails_and_a_missing_library_are_named(chat_run, capsys, monkeypatch, tmp_path):
    run_dir, words = chat_run
    from qsparse_moe.data.chat_template import load_chat_template
    from qsparse_moe.data.tokenizer import load_tokenizer
    from qsparse_moe.errors import BackendUnavailable, DataError

    settings = {"eos_token": "</s>", "chat_template": "{{ raise_exception('no user') }}"}
    broken = save_tokenizer(tmp_path / "broken", vocabulary=words, unknown="<unk>", settings=settings)
    with pytest.raises(DataError, match=r"broken: its chat template cannot write this conversation \(no user\)"):
        load_chat_template(load_tokenizer(str(broken))).encode([{"role": "user", "content": "a"}])
    plain = save_tokenizer(tmp_path / "plain", vocabulary=words, unknown="<unk>", settings={"eos_token": "</s>"})
    assert load_chat_template(load_tokenizer(str(plain))) is None
    (plain / "chat_template.jinja").write_text(TEMPLATE)
    assert load_chat_template(load_tokenizer(str(plain))) is not None
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendUnavailable, match=r'not installed; pip install "qsparse-moe\[hf\]"'):
        load_chat_template(load_tokenizer(str(plain)))


def test_evaluation_token_by_token_gives_the_same_loss(run_dir, capsys):
    losses = []
    for engine in ("training", "inference"):
        assert run(["evaluate", str(run_dir), "--rows", "4", "--engine", engine, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
