"""What a run keeps to itself, and what it does not let in."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from tests.models import make_tiny_qwen3
from tests.test_cluster import settings_for
from tests.workspace import Workspace, make_workspace, refusal, settings_of
from tic_megatron.actors.group import ActorGroup
from tic_megatron.cli import main
from tic_megatron.cluster import closed_to_others, start_cluster
from tic_megatron.commands.preflight import preflight
from tic_megatron.config import LoggingSettings, RewardSettings
from tic_megatron.observability.metrics import MetricsLogger
from tic_megatron.rendezvous import join_store, open_store
from tic_megatron.rewards import RewardWorkers
from tic_megatron.rewards.worker_process import without_secrets
from tic_megatron.rollout import engine, engines

PACKAGE = Path(engine.__file__).resolve().parents[1]

CLIENT = """
import sys
from ray._raylet import GcsClient
try:
    print("let in", len(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=20)))
except Exception as error:
    print("refused", type(error).__name__)
"""


def connect(address: str, **token: str) -> subprocess.Popen:
    """Another process on the machine that wants to talk to the cluster, with no other Ray environment than this."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")} | token
    command = [sys.executable, "-c", CLIENT, address]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_our_cluster_is_closed_to_others() -> None:
    """A real Ray: it listens on the loopback only, and lets nobody in without its token, which is in no file or command line."""
    before = dict(os.environ)
    with start_cluster(settings_for(actors=1, colocate=True)):
        address, token = ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"]
        ray.get(ray.remote(num_cpus=0)(lambda: 0).remote(), timeout=60)  # a worker process is up
        ours = descendants(os.getpid())
        clients = [
            connect(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
            connect(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
            connect(address, RAY_AUTH_MODE="disabled"),
        ]
        answers = [client.communicate(timeout=100)[0].strip() for client in clients]
        assert answers == ["let in 1", "refused AuthenticationError", "refused AuthenticationError"]
        listening = listeners(ours)
        assert len(listening) >= 3 and set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F"}, listening
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ours if Path(f"/proc/{pid}").exists()]
        assert len(lines) > 3 and not any(token.encode() in line for line in lines)
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        written = [path for path in session.rglob("*") if path.is_file()]
        assert len(written) > 5 and not [path for path in written if token.encode() in path.read_bytes()]
    left = {name for name in os.environ if "AUTH" in name and os.environ[name] != before.get(name)}
    assert left <= {"RAY_AUTH_MODE"}  # which Ray sets itself
    with closed_to_others():
        assert os.environ["RAY_AUTH_TOKEN"] != token


def test_a_token_that_the_user_gives_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    with closed_to_others():
        assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/where/it/is")
    with closed_to_others():
        assert "RAY_AUTH_TOKEN" not in os.environ


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [process for child in children for process in (child, *descendants(child))]


def listeners(pids: list[int]) -> list[str]:
    """The addresses, as the kernel writes them in hexadecimal digits, on which the processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        for descriptor in range(1000):
            try:
                sockets.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
            except OSError:
                continue  # not open
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), seed=0, tie_word_embeddings=True)


@pytest.fixture
def workspace(tmp_path: Path, tiny_qwen3: Path) -> Workspace:
    return make_workspace(tmp_path, tiny_qwen3)


SENTINELS = {name: f"sentinel-{name.lower()}" for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "RAY_AUTH_TOKEN")}


def test_no_secret_of_the_environment_is_written(workspace, monkeypatch, capfd) -> None:
    """A run of real parts (Ray, a training process, graders, loggers) that fails: its folder and its output."""
    for name, value in SENTINELS.items():
        monkeypatch.setenv(name, value)

    def fail(settings, inputs):
        folder = Path(settings.run.dir)
        MetricsLogger(folder, LoggingSettings(), "run", settings.flatten()).log(1, {"reward/mean": 0.0})
        with RewardWorkers(RewardSettings(workers=1), folder / "logs" / "rewards.log") as workers:
            workers.grade([("1/0", "2")])
            environment = Path(f"/proc/{workers.workers[0].pid}/environ").read_text()
            assert not [value for value in SENTINELS.values() if value in environment]
        with start_cluster(settings) as cluster:
            actors = ActorGroup.start(settings, cluster, log_dir=folder / "logs")
            actors.setup("/there/is/no/model")

    monkeypatch.setitem(sys.modules, "tic_megatron.trainer", types.SimpleNamespace(train=fail))
    monkeypatch.setattr("tic_megatron.commands.train.supervise", lambda drive, **_: min(drive(0), 1))
    assert main([*workspace.base, "--cluster.device=cpu", "--run.max_restarts=0"]) == 1
    printed = capfd.readouterr()
    assert "training rank 0 failed in setup" in printed.err
    files = [path for path in (workspace.root / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "driver.log", "actor_0.log", "rewards.log"} <= {path.name for path in files}
    written = {path.name: path.read_bytes() for path in files} | {"the output": (printed.out + printed.err).encode()}
    assert not [(name, s) for name, content in written.items() for s in SENTINELS.values() if s.encode() in content]


def test_what_looks_like_a_secret() -> None:
    secret = {"HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD_FILE", "GOOGLE_APPLICATION_CREDENTIALS"}
    secret |= {"PGPASSWORD", "OPENAI_APIKEY", "GITHUB_PAT", "MYSQL_PWD", "DB_PASS", "GPG_PASSPHRASE", "NPM_CONFIG_AUTHTOKEN"}
    harmless = {"PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "MONKEY", "OMP_NUM_THREADS", "MAX_TOKENS", "COMPASS", "BYPASSED"}
    assert set(without_secrets(dict.fromkeys(secret | harmless, "x"))) == harmless
    addresses = {"DATABASE_URL": "postgres://me:hush@host/db", "HOME_URL": "https://host/a:b@c", "MIRROR": "https://me@host"}
    assert set(without_secrets(addresses)) == {"HOME_URL", "MIRROR"}


def test_the_ranks_meet_on_the_loopback_only() -> None:
    store = open_store("127.0.0.1", 20.0)
    join_store("127.0.0.1", store.port, 20.0).set("from", "a rank")
    assert store.get("from") == b"a rank"
    listening = [
        line.split()[1].split(":")[0]
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(file).read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{store.port:04X}") and line.split()[3] == "0A"
    ]
    assert listening == ["0100007F"]


def bring_code(model: Path, name: str) -> Path:
    """Have the model name a class of its own, whose file leaves a trace when it is run."""
    trace = model / "it_ran"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n"
    if name == "config.json":
        code += "from transformers import Qwen3Config\nclass Own(Qwen3Config): pass\n"
        entry = {"AutoConfig": "own.Own"}
    else:
        code += "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
        entry = {"AutoTokenizer": [None, "own.Own"]}
    (model / "own.py").write_text(code)
    path = model / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": entry}))
    return trace


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_runs_only_when_asked_for(workspace, capsys, monkeypatch, tmp_path, name) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    trace = bring_code(workspace.model, name)
    line = refusal(capsys, workspace.base)
    assert name in line and "auto_map" in line and "model.trust_remote_code true" in line
    assert not trace.exists()
    settings = settings_of(*workspace.base[1:], "--model.trust_remote_code=true", "--cluster.device=cpu")
    inputs = preflight(settings.resolve())
    assert trace.exists() and "Own" in (type(inputs.hf_config).__name__, type(inputs.tokenizer).__name__)


def test_the_engines_are_told_whether_to_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm.config"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(WeightTransferConfig=dict))
    for trusted in (False, True):
        settings = settings_for(actors=1, colocate=True)
        settings.model.trust_remote_code = trusted
        options = engines._options(settings, "model", "cpu", "log", ())
        assert engine._llm_arguments(options)["trust_remote_code"] is trusted


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}


def unsafe_uses(source: str) -> list[str]:
    """What a module's source uses that can run code found in a file, or trusts code from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if name in UNSAFE_CALLS or name.partition(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.Attribute):
            found += [ast.unparse(node)] * (ast.unparse(node) in UNSAFE_CALLS)
        elif isinstance(node, ast.keyword):
            value = ast.unparse(node.value)
            unsafe = {"allow_pickle": value != "False", "trust_remote_code": value == "True", "weights_only": value != "True"}
            found += [f"{node.arg}={value}"] * unsafe.get(node.arg, False)
        elif isinstance(node, ast.Constant) and node.value == "VLLM_ALLOW_INSECURE_SERIALIZATION":
            found.append(node.value)
    return found


def test_nothing_is_unpickled_unchecked() -> None:
    """But for the one module that checks a checkpoint's pickles: with an unpickler of its own, and by `weights_only`."""
    root = PACKAGE.parent
    sources = [path for folder in (PACKAGE, root / "examples", root / "benchmarks") for path in folder.rglob("*.py")]
    found = {str(path.relative_to(root)): unsafe_uses(path.read_text()) for path in sources}
    assert len(found) > 80
    only = {"tic_megatron/actors/megatron/metadata.py": ["pickle", "torch.load"]}
    assert {name: uses for name, uses in found.items() if uses} == only


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "import yaml\nyaml.load(x, Loader=L)"),
        *("np.load('x', allow_pickle=True)", "f(weights_only=False)", "f(trust_remote_code=True)", "from torch import load"),
        "os.environ['VLLM_ALLOW_INSECURE_SERIALIZATION'] = '1'",
    ],
)
def test_the_search_finds_unsafe_uses(source: str) -> None:
    assert len(unsafe_uses(source)) == 1
