"""Configuration and settings.py: one table; file, variable, flag; every mistake at once."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incidents
import nightcrier
from nightcrier import OPTIONS, Config, ConfigError
from settings import Option

LOADS = Callable[..., Config]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: no config.yaml but the one that the test writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(here: Path) -> LOADS:
    """Load a configuration from the text of a file, variables, and flags."""

    def load(text: str | None = None, *, need_clusters: bool = False, **flags: Any) -> Config:
        environment = flags.pop("environment", {})
        if text is not None:
            (here / "config.yaml").write_text(textwrap.dedent(text))
        return nightcrier.load_config(flags, environment=environment, need_clusters=need_clusters)

    return load


def problems_of(load: LOADS, *args: Any, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    assert caught.value.exit_code == 3
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# --- where values come from ---------------------------------------------------------------------

# A value of each option as text, and as it is read; options whose default is no such value.
SAMPLES: dict[str, tuple[str, Any]] = {
    "sqlite": ("other.db", Path("other.db")),
    "postgres_dsn": ("postgresql://u@h/d", "postgresql://u@h/d"),
    "spool_limit": ("2000000", 2_000_000),
    "state_store": ("filesystem", "filesystem"),
    "role": ("worker", incidents.Role.WORKER),
    "subscribe_mode": ("events", incidents.SubscribeMode.EVENTS),
    "agent_cli": ("command", "command"),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "health_listen": ("[::1]:9090", "[::1]:9090"),
    "agent_command": ("agent 'two words'", ("agent", "two words")),
    "slack_webhook_url": ("https://hooks.slack.com/services/T/B/x",) * 2,
    "webhook_url": ("http://[::1]:8000/hook?a=b",) * 2,
    "report_url": ("https://reports.example/{incident_id}/",) * 2,
}


def sample(option: Option) -> tuple[str, Any]:
    """A text for the option that is not its default, and what it must become."""
    if option.key in SAMPLES:
        return SAMPLES[option.key]
    for text in ("70000", "7", "true", "false", "word"):
        try:
            value = option.read(text)
        except ValueError:
            continue
        if value != option.default:
            return text, value
    raise AssertionError(f"add a sample for {option.key}")


EACH_OPTION = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)


@EACH_OPTION
def test_every_option_is_read_from_the_file(option: Option, load: LOADS) -> None:
    text, value = sample(option)
    extra = {} if option.key == "agent_command" else {"agent_command": "agent"}

    config = load(f"{option.key}: {text!r}\n", **extra)

    assert getattr(config, option.key) == value
    assert option.key in config.given


@EACH_OPTION
def test_every_option_is_read_from_the_environment_before_the_file(
    option: Option, load: LOADS
) -> None:
    text, value = sample(option)
    extra = {} if option.key == "agent_command" else {"agent_command": "agent"}
    for variable in option.variables:
        in_file = f"{option.key}: [not, read, {{}}]\n"
        config = load(in_file, environment={variable: text}, **extra)

        assert getattr(config, option.key) == value


@EACH_OPTION
def test_every_option_is_read_from_its_flag_before_all_else(option: Option, load: LOADS) -> None:
    if option.flag is None:
        assert option.secret
        return
    text, value = sample(option)
    flags = {"agent_command": "agent", option.key: text}
    config = load(
        f"{option.key}: [not, read, {{}}]\n", environment={option.variables[0]: "\x00"}, **flags
    )

    assert getattr(config, option.key) == value
    assert option.flag == "--" + option.key.replace("_", "-")


@EACH_OPTION
def test_every_option_has_a_default_and_a_line_of_help(option: Option, load: LOADS) -> None:
    config = load()

    assert getattr(config, option.key) == option.default
    assert option.key not in config.given
    assert option.help
    assert option.metavar


def test_an_empty_variable_is_as_good_as_none(load: LOADS) -> None:
    assert load(environment={"NIGHTCRIER_AGENT_TIMEOUT": ""}).agent_timeout == 300


def test_an_empty_key_in_the_file_is_as_good_as_none(load: LOADS) -> None:
    config = load('anthropic_api_key: k\nopenai_api_key: ""\ngemini_api_key: ""\n')
    assert (config.openai_api_key, config.gemini_api_key) == (None, None)
    assert "" not in config.secrets()


def test_names_of_variables_of_the_existing_nightcrier_are_understood(load: LOADS) -> None:
    environment = {
        "AGENT_TIMEOUT": "60",
        "SHUTDOWN_TIMEOUT_SECONDS": "5",
        "ANTHROPIC_API_KEY": "key-of-claude",
        "SQLITE_PATH": "old.db",
    }
    config = load(environment=environment)

    assert (config.agent_timeout, config.shutdown_timeout) == (60, 5)
    assert (config.anthropic_api_key, config.sqlite) == ("key-of-claude", Path("old.db"))


def test_our_name_of_a_variable_goes_before_the_existing_one(load: LOADS) -> None:
    environment = {"NIGHTCRIER_AGENT_TIMEOUT": "70", "AGENT_TIMEOUT": "60"}
    assert load(environment=environment).agent_timeout == 70


def test_the_file_is_found_by_flag_then_variable_then_place(here: Path) -> None:
    def found(given: str | None = None, **environment: str) -> Path | None:
        return nightcrier.find_config_file(given, environment)

    assert found() is None
    (here / "configs").mkdir()
    (here / "configs/config.yaml").write_text("")
    assert found() == Path("configs/config.yaml")
    (here / "config.yaml").write_text("")
    assert found() == Path("config.yaml")
    assert found(NIGHTCRIER_CONFIG="b.yaml") == Path("b.yaml")
    assert found("a.yaml", NIGHTCRIER_CONFIG="b.yaml") == Path("a.yaml")


@pytest.mark.parametrize("value", ["true", "Yes", "1"])
def test_booleans_are_words_too(value: str, load: LOADS) -> None:
    text = f"""
        clusters:
          - name: a
            mcp: {{endpoint: 'http://a/mcp'}}
            triage: {{enabled: '{value}'}}
        """
    assert load(text).clusters[0].triage_enabled


# --- secrets --------------------------------------------------------------------------------------


def test_a_secret_is_read_from_a_file_and_shows_up_nowhere(load: LOADS, here: Path) -> None:
    (here / "key").write_text("sk-very-secret\n")
    for config in (
        load("anthropic_api_key_file: key\n"),
        load("", environment={"NIGHTCRIER_ANTHROPIC_API_KEY_FILE": "key"}),
        load("anthropic_api_key: sk-very-secret\n"),
    ):
        assert config.anthropic_api_key == "sk-very-secret"
        assert "sk-very-secret" not in repr(config)
        assert "sk-very-secret" in list(config.secrets())


def test_the_key_of_a_cluster_shows_up_nowhere_and_its_file_is_read_each_time(
    load: LOADS, here: Path
) -> None:
    (here / "token").write_text("first-token\n")
    config = load("""
        clusters:
          - {name: a, mcp: {endpoint: 'http://a/mcp', api_key: key-of-a}}
          - {name: b, mcp: {endpoint: 'http://b/mcp', api_key_file: token}}
        """)
    assert [cluster.read_api_key() for cluster in config.clusters] == ["key-of-a", "first-token"]
    assert set(config.secrets()) >= {"key-of-a", "first-token"}
    assert "key-of-a" not in repr(config)

    (here / "token").write_text("second-token\n")
    assert config.clusters[1].read_api_key() == "second-token"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", "directory"])
def test_a_secret_that_cannot_be_read_is_a_mistake_that_does_not_show_it(
    content: bytes | str | None, load: LOADS, here: Path
) -> None:
    if content == "directory":
        (here / "key").mkdir()
    elif isinstance(content, bytes):
        (here / "key").write_bytes(content)
    problems = problems_of(load, "anthropic_api_key_file: key\n")
    assert len(problems) == 1
    assert problems[0].startswith("config.yaml:1: anthropic_api_key_file:")


def test_a_wrong_secret_is_not_repeated_in_the_message(load: LOADS) -> None:
    problems = problems_of(load, 'anthropic_api_key: "hush\\0hush"\n')
    assert "hush" not in problems[0]


# --- mistakes -------------------------------------------------------------------------------------


def test_an_unknown_key_is_a_mistake_with_its_line_and_a_suggestion(load: LOADS) -> None:
    (problem,) = problems_of(load, "# a comment\nrole: all\nagent_timout: 5\n")
    assert problem.startswith("config.yaml:3: unknown key 'agent_timout'")
    assert "did you mean 'agent_timeout'?" in problem


def test_a_key_that_is_given_twice_is_a_mistake_that_names_both_lines(load: LOADS) -> None:
    (problem,) = problems_of(load, "agent_timeout: 5\nrole: all\nagent_timeout: 6\n")
    assert problem.startswith("config.yaml:3:")
    assert "'agent_timeout' is given twice" in problem
    assert "line 1" in problem


def test_ten_mistakes_make_ten_messages(load: LOADS) -> None:
    problems = problems_of(
        load,
        """\
        agent_timeout: soon
        max_attempts: 0
        role: king
        log_level: loud
        health_listen: here
        sqlite: ''
        colour: red
        workspace_root: 7
        agent_env: {a: b}
        clusters:
          - name: no spaces
            mcp: {endpoint: 'http://a/mcp'}
        """,
    )
    assert len(problems) == 10
    lines = sorted(int(problem.split(":")[1]) for problem in problems)
    assert lines == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]


def test_a_mistake_in_a_flag_or_variable_names_the_flag_or_variable(load: LOADS) -> None:
    problems = problems_of(
        load, max_attempts="many", environment={"NIGHTCRIER_LEASE_DURATION": "-1"}
    )
    assert [problem.split(":")[0] for problem in sorted(problems)] == [
        "--max-attempts",
        "NIGHTCRIER_LEASE_DURATION",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("agent_timeout", ".nan"),
        ("agent_timeout", ".inf"),
        ("agent_timeout", "true"),
        ("agent_timeout", "0"),
        ("agent_timeout", "[5]"),
        ("agent_timeout", "1" + "0" * 400),
        ("max_attempts", "1.5"),
        ("max_attempts", "true"),
        ("max_attempts", "0x" + "f" * 5000),
        ("max_concurrent_agents", "1001"),
        ("role", "ALL"),
        ("role", "[all]"),
        ("sqlite", "~nobody-has-this-name/db"),
        ("sqlite", '"a\\0b"'),
        ("agent_command", "'unclosed \"quote'"),
        ("agent_command", "[]"),
        ("agent_command", "[[]]"),
        ("agent_env", "[1]"),
        ("agent_args", "{a: b}"),
        ("agent_max_turns", "-1"),
        ("health_listen", "8080"),
        ("health_listen", "host:99999"),
        ("health_listen", ":8080"),
        ("subscribe_mode", "2001-02-29"),
    ],
)
def test_a_wrong_value_is_a_mistake_on_its_line(key: str, value: str, load: LOADS) -> None:
    problems = problems_of(load, f"\n{key}: {value}\n")
    assert len(problems) == 1
    assert problems[0].startswith("config.yaml:")
    assert len(problems[0]) < 400


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1\nb: 2\n", "config.yaml:2:2: "),
        ("a: b: c\n", "config.yaml:1:5: "),
        ("a: \t{\n", "config.yaml:1:4: "),
        ("a: *nothing\n", "config.yaml:1:4: "),
        ("--- {}\n--- {}\n", "config.yaml:2:1: "),
    ],
)
def test_what_is_no_yaml_is_a_mistake_with_line_and_column(
    text: str, place: str, load: LOADS
) -> None:
    (problem,) = problems_of(load, text)
    assert problem.startswith(place)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"- a\n- b\n",
        b"just text",
        b"7",
        b"a: \x00",
        b"agent_retries: !!bool what",
        b"agent_retries: !!int ''",
        b"agent_retries: !!timestamp what",
        b"agent_retries: !!python/object:os.system {}",
        b"? [a]\n: b",
        b"x: &x [*x]",
        b"[" * 5000,
    ],
)
def test_a_file_that_holds_something_else_is_a_mistake_not_a_crash(
    content: bytes, load: LOADS, here: Path
) -> None:
    (here / "config.yaml").write_bytes(content)
    assert problems_of(load)[0].startswith("config.yaml")


def test_a_file_that_is_not_there_or_a_directory_is_a_mistake(load: LOADS, here: Path) -> None:
    assert "cannot be read" in problems_of(load, config="absent.yaml")[0]
    assert "cannot be read" in problems_of(load, config=str(here))[0]


def test_an_empty_file_and_a_byte_order_mark_are_fine(load: LOADS, here: Path) -> None:
    assert load("").agent_timeout == 300
    assert load("# nothing but a comment\n").agent_timeout == 300
    (here / "config.yaml").write_bytes(b"\xef\xbb\xbfagent_timeout: 5\r\n")
    assert load().agent_timeout == 5


# --- keys of the existing nightcrier --------------------------------------------------------------

EXISTING = """\
subscribe_mode: faults
workspace_root: ./incidents
agent_script_path: ./agent-container/run-agent.sh
agent_timeout: 300
agent_model: sonnet
agent_cli: claude
agent_image: nightcrier-agent
agent_allowed_tools: Read,Write
agent_verbose: true
additional_agent_prompt: Be brief.
severity_threshold: ERROR
max_concurrent_agents: 5
global_queue_size: 100
cluster_queue_size: 10
dedup_window_seconds: 300
queue_overflow_policy: drop
shutdown_timeout: 30
sse_reconnect_initial_backoff: 1
sse_reconnect_max_backoff: 60
sse_read_timeout: 300
anthropic_api_key: sk-key
log_level: info
upload_failed_investigations: false
azure_storage_account: account
skills: {disable_triage_preload: true}
tuning: {agent: {timeout_buffer_seconds: 60}}
clusters:
  - name: prod
    environment: production
    labels: {team: night}
    mcp: {endpoint: http://mcp:8080/mcp}
    triage: {enabled: false, allow_secrets_access: true}
"""


def test_a_configuration_of_the_existing_nightcrier_is_understood_with_warnings(
    load: LOADS,
) -> None:
    config = load(EXISTING, need_clusters=True)

    assert config.agent_timeout == 300
    assert config.agent_allowed_tools == ("Read", "Write")
    assert config.clusters[0].labels == {"environment": "production", "team": "night"}
    assert not config.clusters[0].triage_enabled
    warned = "\n".join(config.warnings)
    for key in ("severity_threshold", "dedup_window_seconds", "queue_overflow_policy", "tuning"):
        assert f": {key} has no effect: " in warned
    assert "config.yaml:11: severity_threshold" in warned


def test_no_key_of_the_existing_nightcrier_is_unknown(load: LOADS) -> None:
    keys = (  # noqa: SIM905
        "subscribe_mode workspace_root agent_script_path agent_timeout agent_model agent_cli "
        "agent_image severity_threshold max_concurrent_agents global_queue_size tuning skills "
        "cluster_queue_size failure_threshold_for_alert shutdown_timeout dedup_window_seconds "
        "queue_overflow_policy sse_reconnect_initial_backoff sse_reconnect_max_backoff "
        "sse_read_timeout anthropic_api_key openai_api_key gemini_api_key log_level "
        "agent_system_prompt_file agent_allowed_tools agent_verbose additional_agent_prompt "
        "slack_webhook_url notify_on_agent_failure upload_failed_investigations azure_sas_expiry "
        "azure_storage_connection_string azure_storage_account azure_storage_key "
        "azure_storage_container state_storage nonsense"
    ).split()
    problems = problems_of(load, "".join(f"{key}: {{}}\n" for key in keys))
    unknown = [problem for problem in problems if "unknown key" in problem]
    assert [problem.split("'")[1] for problem in unknown] == ["nonsense"]


def test_state_storage_becomes_our_options_with_a_warning(load: LOADS) -> None:
    config = load("""
        state_storage:
          type: filesystem
          sqlite_path: old.db
          migrations_path: ./migrations
        """)
    assert (config.state_store, config.sqlite) == ("filesystem", Path("old.db"))
    assert [warning.split(": ", 1)[1].split()[0] for warning in config.warnings] == [
        "state_storage.type",
        "state_storage.sqlite_path",
        "state_storage.migrations_path",
    ]


def test_our_own_key_goes_before_state_storage(load: LOADS) -> None:
    config = load("sqlite: new.db\nstate_storage: {sqlite_path: old.db}\n")
    assert config.sqlite == Path("new.db")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("state_storage: {type: mysql}\n", "must be one of"),
        ("state_storage: {sqlite_path: 7}\n", "must be a text"),
        ("state_storage: sqlite\n", "must be a mapping"),
        ("state_storage: [sqlite]\n", "must be a mapping"),
    ],
)
def test_mistakes_in_state_storage_are_found(text: str, expected: str, load: LOADS) -> None:
    (problem,) = problems_of(load, text)
    assert expected in problem


# --- clusters -------------------------------------------------------------------------------------


def test_clusters_come_from_flags_and_from_the_file(load: LOADS) -> None:
    config = load(
        "clusters: [{name: b, mcp: {endpoint: 'https://b/mcp'}}]\n",
        cluster=["a=http://a:8080/mcp?x=y"],
        need_clusters=True,
    )
    assert [(cluster.name, cluster.endpoint) for cluster in config.clusters] == [
        ("a", "http://a:8080/mcp?x=y"),
        ("b", "https://b/mcp"),
    ]


@pytest.mark.parametrize(
    "text", ["", "a", "a=", "=http://x/", "a b=http://x/", "a=ftp://x/", "a=http://x/\udcff"]
)
def test_a_wrong_cluster_flag_is_a_mistake_that_says_the_form(text: str, load: LOADS) -> None:
    (problem,) = problems_of(load, cluster=[text])
    assert "must be NAME=URL" in problem


def test_having_no_cluster_is_a_mistake_only_for_who_watches(load: LOADS) -> None:
    assert "no cluster to watch" in problems_of(load, need_clusters=True)[0]
    assert load(need_clusters=True, role="worker").clusters == ()
    assert load(need_clusters=False).clusters == ()


def test_two_clusters_of_one_name_are_a_mistake(load: LOADS) -> None:
    (problem,) = problems_of(load, cluster=["a=http://a/", "a=http://b/"])
    assert "'a' is given 2 times" in problem


GOOD = "{name: a, mcp: {endpoint: 'http://a/mcp'}}"


@pytest.mark.parametrize(
    ("clusters", "expected"),
    [
        ("{a: b}", "must be a list"),
        ("text", "must be a list"),
        ("[text]", "must be a mapping"),
        ("[{}]", "name: is missing"),
        ("[{name: ~, mcp: {endpoint: ~}}]", "name: is missing"),
        ("[{name: a}]", "mcp.endpoint: is missing"),
        ("[{}]", "mcp.endpoint: is missing"),
        ("[{name: a b, colour: red}]", "mcp.endpoint: is missing"),
        ("[{environment: x, labels: 7, name: a, mcp: {endpoint: 'http://a'}}]", "labels: must be"),
        ("[{name: a, mcp: ~}]", "mcp.endpoint: is missing"),
        ("[{name: a, mcp: text}]", "must be a mapping"),
        ("[{name: 7, mcp: {endpoint: 'http://a'}}]", "1 to 63 letters"),
        (f"[{{name: {'a' * 64}, mcp: {{endpoint: 'http://a'}}}}]", "1 to 63 letters"),
        ("[{name: a, mcp: {endpoint: 'a:8080'}}]", "must be a URL"),
        ("[{name: a, mcp: {endpoint: 'http://'}}]", "must be a URL"),
        ("[{name: a, mcp: {endpoint: 'http://a:99999'}}]", "must be a URL"),
        ('[{name: a, mcp: {endpoint: "http://a/\\nX: y"}}]', "must be a URL"),
        ("[{name: a, mcp: {endpoint: 'http://[::1'}}]", "must be a URL"),
        ("[{name: a, mcp: {endpoint: 'http://u:hush@a'}}]", "must not hold a password"),
        ("[{name: a, mcp: {endpoint: 'http://a', api_keys: x}}]", "did you mean 'mcp.api_key'?"),
        ("[{name: a, mpc: {}, mcp: {endpoint: 'http://a'}}]", "did you mean 'mcp'?"),
        ("[{name: a, labels: [x], mcp: {endpoint: 'http://a'}}]", "labels: must be a mapping"),
        ("[{name: a, mcp: {endpoint: 'http://a', ca_file: absent}}]", "absent is not there"),
        (f"[{{name: a, mcp: {{endpoint: 'http://a', ca_file: {'x' * 5000}}}}}]", "is not there"),
        ("[{name: a, mcp: {endpoint: 'http://a', api_key: k, api_key_file: c}}]", "not both"),
        ("[{name: a, mcp: {endpoint: 'http://a'}, triage: {enabled: maybe}}]", "true or false"),
        ("[{name: a, mcp: {endpoint: 'http://a'}, triage: {kubeconfig: no}}]", "must be a text"),
        (f"[{GOOD}, {GOOD}]", "'a' is given 2 times"),
    ],
)
def test_a_mistake_in_the_clusters_is_found(clusters: str, expected: str, load: LOADS) -> None:
    problems = problems_of(load, f"\nclusters: {clusters}\n")
    assert expected in "\n".join(problems)
    assert "hush" not in "\n".join(problems)


def test_a_mistake_in_a_cluster_is_named_with_its_line(load: LOADS) -> None:
    problems = problems_of(
        load,
        """\
        clusters:
          - name: a
            mcp:
              endpoint: http://a/mcp
          - name: b
            mcp:
              endpoint: nowhere
              speed: high
        """,
    )
    assert sorted(problem.split(": ")[0] for problem in problems) == [
        "config.yaml:7",
        "config.yaml:8",
    ]


def test_agent_command_is_needed_by_who_investigates_with_it(load: LOADS) -> None:
    assert "agent_command is missing" in problems_of(load, "agent_cli: command\n")[0]
    assert load("agent_cli: command\nrole: ingest\n").agent_command == ()
    assert load("agent_cli: command\nagent_command: [a, 1]\n").agent_command == ("a", "1")


# --- anything at all ------------------------------------------------------------------------------

WORDS = (
    """~ 7 -1 1.5 true text '' "\\0" .nan 2001-01-01 *a &a ~root ~nobody/x http://[ 1:1""".split()  # noqa: SIM905
)
VALUES = st.recursive(
    st.sampled_from([*WORDS, "0x" + "f" * 50, "!!bool x", "!!int ''", "!!binary ="]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(
            st.sampled_from(["name", "mcp", "endpoint", "triage", "enabled", "labels", "7", "~"]),
            inner,
            max_size=4,
        ).map(lambda items: "{" + ", ".join(f"{k}: {v}" for k, v in items.items()) + "}")
    ),
    max_leaves=10,
)
KEYS = st.sampled_from([option.key for option in OPTIONS] * 2 + ["clusters", "state_storage", "x"])
FILES = st.lists(st.tuples(KEYS, VALUES), max_size=6).map(
    lambda lines: "".join(f"{key}: {value}\n" for key, value in lines)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=250)
@given(text=FILES | st.text(max_size=60), clusters=st.lists(st.text(max_size=20), max_size=2))
def test_whatever_a_file_holds_is_a_configuration_or_a_config_error(
    text: str, clusters: list[str], here: Path
) -> None:
    (here / "any.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    flags = {"config": "any.yaml", "cluster": clusters}
    try:
        nightcrier.load_config(flags, environment={}, need_clusters=False)
    except ConfigError as error:
        problems = error.problems
    else:
        return
    assert problems
    assert all(len(problem.splitlines()) == 1 for problem in problems)


# --- PostgreSQL -----------------------------------------------------------------------------------


def test_a_connection_string_is_completed_by_the_usual_variables() -> None:
    environment = {"PGUSER": "night", "PGPASSWORD": "s3cret-word", "PGDATABASE": "crier"}
    config = nightcrier.load_config(
        {"postgres_dsn": "postgresql://db.example:5433"},
        environment=environment,
        need_clusters=False,
    )
    assert config.database == "postgresql://night@db.example:5433/crier"
    assert "s3cret-word" in set(config.secrets())
    assert "s3cret-word" not in repr(config)
    assert config.warnings == ()


@pytest.mark.parametrize("password", ["s3cret-word", "s3cret%2Fword%40"])
def test_a_password_on_the_command_line_works_and_is_warned_of(password: str) -> None:
    dsn = f"postgresql://night:{password}@db.example/crier"
    config = nightcrier.load_config({"postgres_dsn": dsn}, environment={}, need_clusters=False)
    (warning,) = config.warnings
    assert "`ps` shows it" in warning
    assert "s3cret" not in warning + repr(config) + config.database
    assert password in set(config.secrets())
    quiet = nightcrier.load_config(
        {}, environment={"NIGHTCRIER_POSTGRES_DSN": dsn}, need_clusters=False
    )
    assert quiet.warnings == ()
    assert quiet.postgres == config.postgres


def test_a_connection_string_that_cannot_be_used_is_a_mistake_with_its_place(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("log_level: info\npostgres_dsn: postgresql://n:s3cret-word@h:port/d\n")
    with pytest.raises(ConfigError) as raised:
        nightcrier.load_config({"config": str(path)}, environment={}, need_clusters=False)
    (problem,) = raised.value.problems
    assert problem.startswith(f"{path}:2: postgres_dsn: ")
    assert "s3cret" not in problem


def test_what_has_no_effect_beside_a_server_is_said() -> None:
    config = nightcrier.load_config(
        {"postgres_dsn": "postgresql://u@h/d", "sqlite": "n.db"},
        environment={},
        need_clusters=False,
    )
    assert config.warnings == ("--sqlite has no effect: postgres_dsn is given",)


@pytest.mark.parametrize(
    ("storage", "database"),
    [
        (
            "type: postgres\n  postgres_connection_string: postgres://u@h:1/d",
            "postgresql://u@h:1/d",
        ),
        (
            "type: postgres\n  postgres_host: h\n  postgres_port: 1\n  postgres_database: d\n"
            "  postgres_user: u\n  postgres_password: 'p/@'",
            "postgresql://u@h:1/d",
        ),
        ("type: sqlite\n  sqlite_path: n.db\n  postgres_host: h", "n.db"),
    ],
)
def test_the_storage_of_the_existing_nightcrier_is_understood(
    tmp_path: Path, storage: str, database: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"state_storage:\n  {storage}\n  migrations_path: ./migrations\n")
    config = nightcrier.load_config({"config": str(path)}, environment={}, need_clusters=False)
    assert config.database == database
    assert all("state_storage" in warning for warning in config.warnings)
    assert "p/@" not in "".join(config.warnings)


def test_a_server_without_its_connection_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("state_storage:\n  type: postgres\n")
    with pytest.raises(ConfigError, match="needs a connection: postgres_dsn"):
        nightcrier.load_config({"config": str(path)}, environment={}, need_clusters=False)


# --- the agent of a cluster -----------------------------------------------------------------------

TWO_CLUSTERS = """\
agent_cli: {cli}
agent_model: small
agent_max_turns: 50
clusters:
  - name: prod
    mcp: {{endpoint: 'http://a/mcp'}}
    agent:
      model: large
      allowed_tools: Read, Write
      args: --verbose --tag 'two words'
      max_turns: 9
      timeout: 900
  - name: dev
    mcp: {{endpoint: 'http://b/mcp'}}
    agent: {{args: []}}
"""


def test_a_cluster_has_its_own_settings_of_the_agent_before_all_others(load: LOADS) -> None:
    config = load(TWO_CLUSTERS.format(cli="claude"), agent_args="--global", agent_timeout="60")
    prod, dev = (config.of_cluster(cluster) for cluster in config.clusters)

    assert (prod.agent_model, dev.agent_model, config.agent_model) == ("large", "small", "small")
    assert prod.agent_allowed_tools == ("Read", "Write")
    assert prod.agent_args == ("--verbose", "--tag", "two words")
    assert (prod.agent_max_turns, dev.agent_max_turns) == (9, 50)
    assert (prod.agent_timeout, dev.agent_timeout) == (900.0, 60.0)
    assert (dev.agent_args, config.agent_args) == ((), ("--global",))
    assert config.of_cluster(None) is config
    assert config.warnings == ()


def test_other_settings_of_the_agent_are_no_reason_to_connect_anew(load: LOADS) -> None:
    text = TWO_CLUSTERS.format(cli="claude")
    assert load(text).clusters == load(text.replace("model: large", "model: huge")).clusters


def test_settings_that_an_agent_does_not_have_are_warnings(load: LOADS) -> None:
    warnings = load(TWO_CLUSTERS.format(cli="codex"), agent_provider="openai").warnings
    assert sorted(warning.partition(" has no effect: ")[0] for warning in warnings) == [
        "--agent-provider",
        "cluster prod: agent.allowed_tools",
        "cluster prod: agent.max_turns",
        "config.yaml:3: agent_max_turns",
    ]
    assert "the agent codex has no such setting" in warnings[0]


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("[a]", "agent: must be a mapping"),
        ("{modell: a}", "agent.modell: unknown key; did you mean 'agent.model'?"),
        ("{cli: codex}", "agent.cli: unknown key"),
        ("{model: ''}", "agent.model: must be a text"),
        ("{max_turns: many}", "agent.max_turns: must be a whole number"),
        ("{timeout: 0}", "agent.timeout: must be from 1"),
        ("{args: {a: b}}", "agent.args: must be a list of words"),
    ],
)
def test_a_mistake_in_the_agent_of_a_cluster_is_shown_with_its_line(
    agent: str, message: str, load: LOADS
) -> None:
    text = f"clusters:\n- name: a\n  mcp: {{endpoint: 'http://a/mcp'}}\n  agent:\n    {agent}\n"
    (problem,) = problems_of(load, text)
    assert problem.startswith(("config.yaml:4: ", "config.yaml:5: "))
    assert message in problem
