"""Registration with transformers: by an import in any order, without loading transformers before it is needed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qsparse_moe.errors import BackendUnavailable, ConfigError
from qsparse_moe.interop import serve
from qsparse_moe.interop.auto_model.causal_lm import QSparseMoEForCausalLM
from tests.data.test_tokenizer import save_tokenizer
from tests.interop.auto_models import VOCABULARY, build

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}


def run(code, timeout=120):
    found = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ["<unk>", "</s>", *(f"word{number}" for number in range(VOCABULARY - 2))]
    settings = {
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}",
    }
    path = save_tokenizer(tmp_path_factory.mktemp("served") / "m", vocabulary=words, unknown="<unk>", settings=settings)
    QSparseMoEForCausalLM.of(build("sparse")).save_pretrained(path)
    return path


def test_importing_the_package_first_registers_when_transformers_is_imported(folder):
    output = run(f"""
import sys
import qsparse_moe.interop
import qsparse_moe.interop.state_dict
assert "transformers" not in sys.modules, "it takes seconds, and most of this package does not need it"
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained({str(folder)!r})
print(type(config).__name__, type(AutoModelForCausalLM.from_pretrained({str(folder)!r})).__name__)
""")
    assert output.split() == ["QSparseMoEConfig", "QSparseMoEForCausalLM"]


def test_importing_transformers_first_registers_at_once(folder):
    output = run(f"""
from transformers import AutoConfig, AutoModelForCausalLM
try:
    AutoConfig.from_pretrained({str(folder)!r})
except ValueError:
    print("unknown")
import qsparse_moe.interop
config = AutoConfig.from_pretrained({str(folder)!r})
print(type(AutoModelForCausalLM.from_config(config)).__name__)
""")
    assert output.split() == ["unknown", "QSparseMoEForCausalLM"]


def test_a_configuration_of_ours_alone_registers_the_model(folder):
    output = run(f"""
from qsparse_moe.interop.auto_model.config import QSparseMoEConfig
config = QSparseMoEConfig.from_pretrained({str(folder)!r})
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(config)).__name__)
""")
    assert output.split() == ["QSparseMoEForCausalLM"]


def test_without_transformers_the_package_is_imported_and_its_classes_name_the_extra():
    output = run("""
import sys
sys.modules["transformers"] = None
import qsparse_moe.interop
from qsparse_moe.errors import BackendUnavailable
for name in ("config", "causal_lm", "schedule"):
    try:
        __import__(f"qsparse_moe.interop.auto_model.{name}")
    except BackendUnavailable as error:
        print(error)
""")
    assert output.splitlines() == 3 * [
        "model type qsparse_moe is one of transformers, which is not installed in version 5 or later; pip install "
        '"qsparse-moe[hf]"'
    ]


@pytest.mark.parametrize("options", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_tensor_parallelism_is_refused_with_the_reason(folder, options):
    with pytest.raises(ConfigError, match=r"tp_\w+: must be left out.*selects among all features.*use device_map"):
        QSparseMoEForCausalLM.from_pretrained(folder, **options)


def test_an_unknown_attention_is_refused_with_the_known_ones(folder):
    with pytest.raises(ValueError, match=r'attn_implementation="nonsense"` is not supported.*sdpa'):
        QSparseMoEForCausalLM.from_pretrained(folder, attn_implementation="nonsense")


def without(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)


def test_serving_without_transformers_names_the_packages(monkeypatch):
    without("transformers", monkeypatch)
    with pytest.raises(
        BackendUnavailable, match=r'transformers, which is not installed; pip install "qsparse-moe\[hf\]"'
    ):
        serve.main(["folder"])


def test_serving_without_the_packages_of_the_server_names_them(monkeypatch):
    import transformers.utils.import_utils as found

    monkeypatch.setattr(found, "is_serve_available", lambda: False)
    with pytest.raises(
        BackendUnavailable, match=r'fastapi, uvicorn, and openai.*pip install "transformers\[serving\]"'
    ):
        serve.main(["folder"])


def test_the_command_line_of_transformers_receives_serve_and_knows_the_class(monkeypatch):
    import transformers
    import transformers.cli.transformers as command
    import transformers.utils.import_utils as found

    called = []
    monkeypatch.setattr(found, "is_serve_available", lambda: True)
    monkeypatch.setattr(command, "app", called.append)
    monkeypatch.delattr(transformers, "QSparseMoEForCausalLM", raising=False)
    serve.main(["folder", "--port", "1"])
    assert called == [["serve", "folder", "--port", "1"]]
    assert transformers.QSparseMoEForCausalLM is QSparseMoEForCausalLM


def test_the_server_loads_and_runs_a_folder(folder, monkeypatch):
    """The part of the server that needs none of its packages: its model manager."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    import transformers

    monkeypatch.setattr(transformers, "QSparseMoEForCausalLM", QSparseMoEForCausalLM, raising=False)
    found = manager.ModelManager(device="cpu", dtype="float32")
    try:
        model, tokenizer = found.load_model_and_processor(f"{folder}@main")
    finally:
        found.shutdown()  # its timer, which would keep the process alive for minutes
    assert type(model) is QSparseMoEForCausalLM
    assert tokenizer("word3 word7")["input_ids"] == [5, 9]


@pytest.mark.slow
@pytest.mark.distributed
def test_transformers_serve_answers_a_conversation(folder):
    """One request over the loopback; needs the packages of transformers' server."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "qsparse_moe.interop.serve",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            answer = request_when_ready(port, folder)
        finally:
            server.kill()
            log = server.communicate()[0]
    assert re.search(r"word\d+", answer), (answer, log[-2000:])


def request_when_ready(port, folder, deadline=120.0):
    body = (
        f'{{"model": "{folder}@main", "messages": [{{"role": "user", "content": "word3 word7"}}], "max_tokens": 4, '
        '"temperature": 0}'
    ).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    end = time.monotonic() + deadline
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read().decode()
        except urllib.error.HTTPError:
            raise  # it is an OSError too
        except OSError:  # not listening yet
            if time.monotonic() > end:
                raise
            time.sleep(0.5)
