"""Environments that extend others, sections that are like others, and the data folder of an environment."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from kedro.io import DataCatalog

from hypersd_pipeline.checks import _defining_file
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS, CONFIG_LOADER_CLASS
from hypersd_pipeline.training.config import FeedbackConfig
from hypersd_pipeline.training.terms import PerceptualConfig

CONF = Path(__file__).parents[1] / "conf"
ENVIRONMENTS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
Conf = Callable[..., Path]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conf:
    """``conf({"mine/parameters.yml": "a: 1"})`` writes a conf folder, with empty base and local, below the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(files: dict[str, str]) -> Path:
        for name, text in {"base/parameters.yml": "{}", "local/.gitkeep": "", **files}.items():
            path = tmp_path / "conf" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "conf"

    return write


def loader(folder: Path, env: str | None = None, params: dict[str, Any] | None = None) -> ProjectConfigLoader:
    return ProjectConfigLoader(folder, env=env, runtime_params=params, **CONFIG_LOADER_ARGS)


def sentence(folder: Path, env: str | None = None, params: dict[str, Any] | None = None) -> str:
    """The one sentence that the parameters are refused with."""
    with pytest.raises(UserError) as refusal:
        loader(folder, env, params)["parameters"]
    text = str(refusal.value)
    assert text.endswith((".", "?")) and "\n" not in text
    return text


# --- without any of it -------------------------------------------------------------------------------------------------------------------


def without(value: Any) -> Any:
    """`value` without the keys ``extends`` and ``like``."""
    if isinstance(value, dict):
        return {key: without(item) for key, item in value.items() if key not in ("extends", "like")}
    return [without(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def plain_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's conf without ``extends`` and ``like``."""
    folder = tmp_path_factory.mktemp("plain") / "conf"
    shutil.copytree(CONF, folder)
    for file in folder.rglob("parameters*.yml"):
        file.write_text(yaml.safe_dump(without(yaml.safe_load(file.read_text()) or {})))
    return folder


@pytest.mark.parametrize("params", [{}, {"tscd": {"loop": {"steps": 5}}}])
@pytest.mark.parametrize("env", [None, *ENVIRONMENTS])
def test_without_extends_and_like_it_is_kedro_s_own_loader(plain_conf, env, params):
    ours, kedro_s = (
        kind(plain_conf, env=env, runtime_params=params, **CONFIG_LOADER_ARGS) for kind in (ProjectConfigLoader, OmegaConfigLoader)
    )
    for key in ("parameters", "catalog", "mlflow"):  # the plain loader takes the resolver of ours, which comes first
        found = ours[key]
        assert _without_layers(found) == kedro_s[key] and found


def _without_layers(section: dict[str, Any]) -> dict[str, Any]:
    """The catalog as it is written: the layers for `kedro viz` are added."""

    def plain(entry: Any) -> Any:
        if not isinstance(entry, dict) or "kedro-viz" not in (entry.get("metadata") or {}):
            return entry
        rest = {key: value for key, value in entry["metadata"].items() if key != "kedro-viz"}
        return {**entry, "metadata": rest} if rest else {key: value for key, value in entry.items() if key != "metadata"}

    return {name: plain(entry) for name, entry in section.items()}


def test_the_project_is_wired_to_it():
    assert CONFIG_LOADER_CLASS is ProjectConfigLoader


# --- extends -----------------------------------------------------------------------------------------------------------------------------

LAYERS = {
    "base/parameters.yml": "a: {one: base, two: base, three: base, four: base, five: base}\nlist: [1, 2]\n",
    "paper/parameters.yml": "a: {two: paper, three: paper, four: paper, five: paper}\nlist: [3]\n",
    "small/parameters.yml": "a: {three: small, four: small, five: small}\nadded: {by: small}\n",
    "mine/parameters.yml": "extends: [paper, small]\na: {four: mine, five: mine}\n",
}


def test_each_layer_overrides_the_ones_below_it(conf):
    values = loader(conf(LAYERS), "mine", {"a": {"five": "params"}})["parameters"]
    assert values == {
        "a": {"one": "base", "two": "paper", "three": "small", "four": "mine", "five": "params"},
        "list": [3],
        "added": {"by": "small"},
    }


def test_the_order_of_the_list_decides(conf):
    folder = conf({**LAYERS, "mine/parameters.yml": "extends: [small, paper]\n"})
    assert loader(folder, "mine").environments == ["base", "small", "paper", "mine"]
    assert loader(folder, "mine")["parameters"]["a"] == {"one": "base", **dict.fromkeys(("two", "three", "four", "five"), "paper")}


def test_one_name_need_not_be_a_list_and_may_be_in_any_parameters_file(conf):
    folder = conf({**LAYERS, "mine/parameters.yml": "x: 1\n", "mine/parameters_more.yml": "extends: paper\n"})
    values = loader(folder, "mine")["parameters"]
    assert values["x"] == 1 and values["list"] == [3] and "extends" not in values


def test_extended_environments_extend_others_and_each_is_laid_once(conf):
    folder = conf(
        {
            "base/parameters.yml": "who: base\n",
            "ground/parameters.yml": "who: ground\nonly_ground: 1\nboth: ground\n",
            "left/parameters.yml": "extends: ground\nwho: left\nboth: left\n",
            "right/parameters.yml": "extends: [ground]\nwho: right\n",
            "mine/parameters.yml": "extends: [left, right]\n",
        }
    )
    assert loader(folder, "mine").environments == ["base", "ground", "left", "right", "mine"]
    assert loader(folder, "mine")["parameters"] == {"who": "right", "only_ground": 1, "both": "left"}


def test_local_may_extend_an_environment_and_is_read_without_one(conf):
    folder = conf({**LAYERS, "local/parameters.yml": "extends: paper\na: {five: local}\n"})
    values = loader(folder)["parameters"]
    assert values["a"] == {"one": "base", "two": "paper", "three": "paper", "four": "paper", "five": "local"}


def test_null_in_a_layer_switches_off_and_a_later_layer_starts_afresh(conf):
    folder = conf(
        {
            "base/parameters.yml": "judge: {kind: solo, weights: base}\n",
            "none/parameters.yml": "judge: null\n",
            "mine/parameters.yml": "extends: none\n",
            "other/parameters.yml": "extends: none\njudge: {kind: mine}\n",
        }
    )
    assert loader(folder, "mine")["parameters"] == {"judge": None}
    assert loader(folder, "other")["parameters"] == {"judge": {"kind": "mine"}}


def test_catalog_mlflow_and_credentials_are_extended_too(conf):
    folder = conf(
        {
            "base/catalog.yml": '"lora_{k}": {type: x, filepath: "${data:06_models}/lora_{k}"}\ntable: {type: a, filepath: b}\n',
            "base/mlflow.yml": "server: {uri: base}\ntracking: {name: base}\n",
            "paper/catalog.yml": 'table: {type: pandas.CSVDataset}\npaper: {type: text.TextDataset, filepath: "${data:}/paper.txt"}\n',
            "paper/mlflow.yml": "tracking: {name: paper}\n",
            "paper/credentials.yml": "store: {key: secret}\n",
            "mine/parameters.yml": "extends: paper\n",
            "mine/catalog.yml": "own: {type: text.TextDataset, filepath: x}\n",
        }
    )
    found = loader(folder, "mine")
    assert set(found["catalog"]) == {"lora_{k}", "table", "paper", "own"}
    assert found["catalog"]["table"] == {"type": "pandas.CSVDataset"}  # as without extends: a catalog entry is replaced as a whole
    assert found["catalog"]["paper"]["filepath"] == "data/mine/paper.txt"  # the run's own folder, whoever says it
    assert found["mlflow"] == {"server": {"uri": "base"}, "tracking": {"name": "paper"}}
    assert found["credentials"] == {"store": {"key": "secret"}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("papr", ["there is no environment 'papr'; choose one of paper, small."]),
        ("[paper, none]", ["there is no environment 'none'"]),
        ("..", ["there is no environment '..'"]),
        ("7", ["7 is no name and no list of names", "extends: [sdxl, trial]"]),
        ("null", ["None is no name"]),
        ("''", ["'' is no name"]),
        ("{paper: 1}", ["{'paper': 1} is no name"]),
        ("[paper, 7]", ["['paper', 7] is no name and no list of names"]),
        ("base", ["'base' is below every environment already; remove it"]),
        ("[paper, base]", ["'base' is below every environment already"]),
        ("local", ["'local' cannot be extended, since it belongs to runs without an environment; remove it"]),
        ("sub/paper", ["'sub/paper' is a path; write only the name of a folder in "]),
        ("'sub\\paper'", ["is a path"]),
        ("mine", ["the environments extend each other in a circle (mine -> mine); remove 'mine' here"]),
    ],
)
def test_an_extends_that_cannot_be_followed_is_one_sentence(conf, given, told):
    text = sentence(conf({**LAYERS, "mine/parameters.yml": f"extends: {given}\n"}), "mine")
    assert text.startswith("conf/mine/parameters.yml: extends: ") and all(part in text for part in told), text


def test_a_circle_shows_its_chain_and_the_file_that_closes_it(conf):
    folder = conf(
        {name: f"extends: {to}\n" for name, to in (("a/parameters.yml", "b"), ("b/parameters.yml", "[c]"), ("c/parameters.yml", "b"))}
    )
    text = sentence(folder, "a")
    assert text == "conf/c/parameters.yml: extends: the environments extend each other in a circle (b -> c -> b); remove 'b' here."


@pytest.mark.parametrize("env", ["base", "mine", None])
def test_base_and_params_cannot_extend(conf, env):
    folder = conf({**LAYERS, "base/parameters_more.yml": "extends: paper\n"})
    text = sentence(folder, env)
    assert text == "conf/base/parameters_more.yml: extends: the base configuration is below every environment; remove the key."
    assert sentence(conf(LAYERS), env, {"extends": "paper"}).startswith("--params: extends: only a parameters file can extend")


def test_an_empty_list_extends_nothing(conf):
    assert loader(conf({"mine/parameters.yml": "extends: []\na: 1\n"}), "mine")["parameters"] == {"a": 1}


def test_a_section_that_one_environment_switches_off_stays_off_in_the_next(conf):
    folder = conf(
        {
            "base/parameters.yml": "terms: {a: {size: 8, weight: 1}, b: {size: 8}, c: null}\nlimit: 5\nown: {x: 1}",
            "mine/parameters.yml": "terms: {a: null}\nlimit: null",
            "trial/parameters.yml": "terms: {a: {size: 1}, b: {size: 1}, c: {size: 1}, d: {size: 1}}\nlimit: 2\nown: {x: 2}",
            "both/parameters.yml": "extends: [mine, trial]",
            "again/parameters.yml": "extends: [mine, trial]\nterms: {a: {size: 3}}",
        }
    )
    rest = {"b": {"size": 1}, "c": {"size": 1}, "d": {"size": 1}}
    assert loader(folder, "both")["parameters"] == {"terms": {"a": None, **rest}, "limit": 2, "own": {"x": 2}}
    assert loader(folder, "again")["parameters"]["terms"]["a"] == {"size": 3}


@pytest.mark.parametrize(("base", "resolution"), [("sd15", 512), ("sdxl", 1024)])
def test_the_readme_s_environment_of_one_s_own_is_valid(tmp_path, base, resolution):
    text = (CONF.parent / "README.md").read_text()
    example, trial = re.findall(r"```yaml\n(extends: .*?)```", text, flags=re.DOTALL)
    shutil.copytree(CONF, tmp_path / "conf")
    for name, content in (("mine", example.replace("sdxl", base, 1)), ("mine_trial", trial)):
        (tmp_path / "conf" / name).mkdir()
        (tmp_path / "conf" / name / "parameters.yml").write_text(content)
    found = loader(tmp_path / "conf", "mine_trial")
    values = found["parameters"]
    assert found.environments[0] == "base" and found.environments[-4:] == [base, "mine", "trial", "mine_trial"]
    teacher, data = TeacherConfig(**values["teacher"]), DataConfig(**values["data"])
    assert (teacher.source, teacher.variant, teacher.resolution) == ("/models/my-model", None, resolution)
    assert (data.source.root, data.source.splits, data.max_images) == ("/data/images", None, 256)
    assert FeedbackConfig(**values["feedback"]["stage"]).one(PerceptualConfig) is None
    assert EvaluationConfig(**values["evaluation"]).samples == 64
    assert found["catalog"]["latents"]["filepath"] == "data/mine_trial/05_model_input/latents"


# --- like --------------------------------------------------------------------------------------------------------------------------------

TSCD = """
tscd: {solver: 1, loop: {steps: 40, betas: [0.9, 0.99]}, adversarial: {weight: 0.2}}
tscd_k8: {stage: {like: tscd, segments: 8}}
tscd_k4: {stage: {like: tscd_k8.stage, segments: 4, loop: {betas: [0.5]}, adversarial: null}}
"""


def liked(conf: Conf, text: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
    return loader(conf({"base/parameters.yml": text}), "base", params)["parameters"]


def test_a_section_is_a_copy_in_which_its_own_keys_override(conf):
    values = liked(conf, TSCD)
    assert values["tscd_k8"]["stage"] == {**values["tscd"], "segments": 8}
    assert values["tscd_k4"]["stage"] == {"solver": 1, "segments": 4, "loop": {"steps": 40, "betas": [0.5]}, "adversarial": None}
    assert "like" not in str(values)
    values["tscd_k8"]["stage"]["loop"]["betas"].append(1)
    assert values["tscd"]["loop"]["betas"] == [0.9, 0.99]


def test_a_parameter_of_the_command_line_reaches_every_section_like_it(conf):
    values = liked(conf, TSCD, {"tscd": {"loop": {"steps": 5}}})
    assert [values["tscd"]["loop"]["steps"], *(values[f"tscd_k{k}"]["stage"]["loop"]["steps"] for k in (8, 4))] == [5, 5, 5]
    values = liked(conf, TSCD, {"tscd": {"loop": {"steps": 5}}, "tscd_k8": {"stage": {"loop": {"steps": 6}}}})
    assert [values["tscd"]["loop"]["steps"], *(values[f"tscd_k{k}"]["stage"]["loop"]["steps"] for k in (8, 4))] == [5, 6, 6]


def test_an_environment_s_value_reaches_the_sections_of_base_and_null_of_an_environment_is_kept(conf):
    folder = conf(
        {
            "base/parameters.yml": TSCD,
            "paper/parameters.yml": "tscd: {loop: {steps: 1000}}\n",
            "mine/parameters.yml": "extends: paper\ntscd: {adversarial: null}\ntscd_k8: {stage: {loop: null}}\n",
        }
    )
    values = loader(folder, "mine")["parameters"]
    assert values["tscd_k8"]["stage"] == {"solver": 1, "segments": 8, "loop": None, "adversarial": None}
    assert values["tscd_k4"]["stage"]["loop"] == {"betas": [0.5]}
    assert values["tscd"]["loop"]["steps"] == 1000


def test_a_section_may_take_the_place_of_null(conf):
    assert liked(conf, "a: {x: null}\nb: {like: a, x: {y: 1}}\n")["b"] == {"x": {"y": 1}}


def test_like_works_at_any_depth_in_lists_and_inside_what_is_named(conf):
    values = liked(
        conf,
        """
        loop: {steps: 1, lr: 2}
        a: {b: {c: {d: {like: loop, steps: 3}}}}
        copy: {like: a}
        rewards: [{like: loop}, [{like: a.b.c}], 5]
        """,
    )
    assert values["a"]["b"]["c"]["d"] == {"steps": 3, "lr": 2}
    assert values["copy"] == values["a"]
    assert values["rewards"] == [{"steps": 1, "lr": 2}, [{"d": {"steps": 3, "lr": 2}}], 5]


def test_a_path_may_lead_through_a_section_that_is_like_another(conf):
    values = liked(conf, f"{TSCD}\ndmd: {{loop: {{like: tscd_k4.stage.loop, lr: 1}}}}\n")
    assert values["dmd"]["loop"] == {"steps": 40, "betas": [0.5], "lr": 1}


def test_interpolations_are_resolved_before(conf):
    assert liked(conf, "n: 3\na: {x: '${n}', path: '${data:06_models}'}\nb: {like: a}\n")["b"] == {"x": 3, "path": "data/06_models"}


def test_only_parameters_know_like(conf):
    folder = conf({"base/catalog.yml": "a: {type: x}\nb: {like: a}\n"})
    assert loader(folder, "base")["catalog"]["b"] == {"like": "a"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: {x: {like: c}}\nb: {y: 1}", "a.x.like: there is no section 'c'; choose one of a, b."),
        ("a: {like: b.z}\nb: {y: {}}", "a.like: there is no section 'b.z'; choose one of y."),
        ("a: {like: steps}\nstep: {y: {}}", "a.like: there is no section 'steps'; did you mean 'step'?"),
        (
            "a: {like: z}\n" + "\n".join(f"section_{i}: {{y: {{}}}}" for i in range(60)),
            "a.like: there is no section 'z'; correct the path.",
        ),
        ("a: {like: b.z.t}\nb: {y: 1}", "a.like: there is no section 'b.z'; correct the path."),
        ("a: {like: ''}", "a.like: '' is no name; write the dotted path of a section, for instance `like: tscd`."),
        ("a: {like: 5}", "a.like: 5 is no name; write the dotted path of a section, for instance `like: tscd`."),
        ("a: {like: [b]}\nb: {}", "a.like: ['b'] is no name; write the dotted path of a section, for instance `like: tscd`."),
        ("a: {like: null}", "a.like: None is no name; write the dotted path of a section, for instance `like: tscd`."),
        ("a: {like: b.y}\nb: {y: 1}", "a.like: 'b.y' is a value; name the section that it is in."),
        ("a: {like: b.y.z}\nb: {y: [1]}", "a.like: 'b.y' is a value; name the section that it is in."),
        (
            "a: {x: {like: b}}\nb: {like: c}\nc: {like: a.x}",
            "a.x.like: the sections are like each other in a circle (a.x -> b -> c -> a.x); name another section.",
        ),
        ("a: {like: a}", "a.like: the sections are like each other in a circle (a -> a); name another section."),
        ("a: {x: {like: a}}", "a.x.like: the sections are like each other in a circle (a.x -> a -> a.x); name another section."),
        (
            "a: [{like: b}]\nb: {x: {like: b}}",
            "b.x.like: the sections are like each other in a circle (b.x -> b -> b.x); name another section.",
        ),
        (
            "like: a\na: {}",
            "like: the sections are like each other in a circle (all parameters -> a -> all parameters); name another section.",
        ),
    ],
)
def test_a_like_that_cannot_be_followed_is_one_sentence(conf, text, told):
    assert sentence(conf({"base/parameters.yml": text}), "base") == f"conf/base/parameters.yml: {told}"


def test_the_file_of_a_like_is_the_one_that_overrides(conf):
    files = {
        "base/parameters.yml": "a: {like: b}\nb: {}\n",
        "paper/parameters.yml": "a: {like: c}\n",
        "mine/parameters.yml": "extends: paper\nd: 1\n",
        "yours/parameters.yml": "rewards: [{like: c}]\n",
    }
    folder = conf(files)
    assert sentence(folder, "mine").startswith("conf/paper/parameters.yml: a.like: there is no section 'c'")
    assert sentence(folder, "base", {"a": {"like": "e"}}).startswith("--params: a.like: there is no section 'e'")
    assert sentence(folder, "yours").startswith("conf/yours/parameters.yml: rewards.0.like: there is no section 'c'")


# --- the data folder ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "folder"), [(None, "data"), ("base", "data"), ("local", "data"), ("mine", "data/mine"), ("mine_trial", "data/mine_trial")]
)
def test_an_environment_writes_below_its_own_folder(conf, env, folder):
    text = "a: '${data:}'\nb: '${data:06_models/x}'\nc: ${data:08_reporting}/y_{k}.json\n"
    written = conf({"base/parameters.yml": text, "mine/parameters.yml": "x: 1", "mine_trial/parameters.yml": "extends: mine"})
    values = loader(written, env)["parameters"]
    assert [values[key] for key in "abc"] == [folder, f"{folder}/06_models/x", f"{folder}/08_reporting/y_{{k}}.json"]


def test_loaders_of_two_environments_do_not_disturb_each_other(conf):
    folder = conf({"base/catalog.yml": "a: {type: x, filepath: '${data:a}'}\n", "one/parameters.yml": "x: 1", "two/parameters.yml": "x: 1"})
    one, two = loader(folder, "one"), loader(folder, "two")
    assert [found["catalog"]["a"]["filepath"] for found in (one, two, one, loader(folder))] == [
        "data/one/a",
        "data/two/a",
        "data/one/a",
        "data/a",
    ]


@pytest.mark.parametrize(("env", "folder"), [("base", "data"), ("smoke", "data/smoke")])
def test_patterns_and_nested_paths_of_the_catalog_have_the_folder(env, folder):
    entries = loader(CONF, env)["catalog"]
    catalog = DataCatalog.from_config(entries)
    assert str(catalog.get("lora_k8")._filepath) == f"{folder}/06_models/lora_k8"
    assert str(catalog.get("tscd_k4.metric_stream")._filepath) == f"{folder}/08_reporting/curves/tscd_k4.csv"
    assert catalog.get("merged_feedback")._path == f"{folder}/06_models/lora_with_feedback"
    assert entries["latents"]["manifest"] == {"filepath": f"{folder}/03_primary/manifest"}


def test_every_path_of_the_catalog_is_below_the_folder():
    def paths(value: Any) -> list[str]:
        inner = [path for item in value.values() if isinstance(item, dict) for path in paths(item)]
        return inner + [str(item) for key, item in value.items() if key in ("filepath", "path")]

    found = paths(loader(CONF, "smoke")["catalog"])
    assert len(found) > 40 and all(path.startswith("data/smoke/0") for path in found)


# --- which file an error names -----------------------------------------------------------------------------------------------------------

DEFINED = {
    "base/parameters_tscd.yml": TSCD,
    "paper/parameters.yml": "tscd: {loop: {steps: 1000}}\n",
    "mine/parameters.yml": "extends: paper\ntscd_k4: {stage: {solver: 2}}\n",
}


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("tscd_k4.stage.solver", "conf/mine/parameters.yml"),
        ("tscd.loop.steps", "conf/paper/parameters.yml"),
        ("tscd_k8.stage.loop.steps", "conf/paper/parameters.yml"),  # through like
        ("tscd_k4.stage.loop.steps", "conf/paper/parameters.yml"),  # through two of them
        ("tscd_k4.stage.loop.betas", "conf/base/parameters_tscd.yml"),  # its own before the named section's
        ("tscd_k8.stage.solver", "conf/base/parameters_tscd.yml"),
        ("tscd_k8.stage.solver.0", "conf/base/parameters_tscd.yml"),
        ("tscd_k8.stage.none", "conf/base/parameters_tscd.yml"),  # the nearest key above
        ("nothing", "conf/base"),
        ("tscd.guidance", "--params"),
        ("tscd_k4.stage.guidance", "--params"),
    ],
)
def test_the_defining_file(conf, key, file):
    folder = conf(DEFINED)
    found = loader(folder, "mine", {"tscd": {"guidance": 3}})
    assert _defining_file(key.split("."), found, folder.parent) == file


def test_a_refused_value_names_its_file_on_the_command_line(small_project, kedro):
    files = {
        "base/parameters.yml": {
            "size": 4,
            "all": {"segments": 2},
            "tscd_k2": {"stage": {"like": "all"}},
            "tscd_k1": {"stage": {"like": "all"}},
        },
        "paper/parameters.yml": {"all": {"segments": 0}},
        "mine/parameters.yml": {"extends": "paper"},
        "round/parameters.yml": {"extends": "rounder"},
        "rounder/parameters.yml": {"extends": "round"},
    }
    for name, values in files.items():
        (small_project / "conf" / name).parent.mkdir(exist_ok=True)
        (small_project / "conf" / name).write_text(yaml.safe_dump(values))
    (small_project / "conf/base/catalog.yml").write_text(
        (small_project / "conf/base/catalog.yml").read_text().replace("data/", "${data:}/")
    )
    told = kedro(small_project, "run", "--env", "mine").stderr
    assert "Error: conf/paper/parameters.yml: tscd_k2.stage.segments: " in told or "Error: conf/paper/parameters.yml: tscd_k1" in told
    told = kedro(small_project, "run", "--env", "round").stderr
    assert "Error: conf/rounder/parameters.yml: extends: the environments extend each other in a circle" in told and "Traceback" not in told
    told = kedro(small_project, "run", "--env", "mine", "--params", "all.segments=3").stderr
    assert "`kedro run --env mine --pipelines data_prep --to-outputs metrics_data`" in told
    assert kedro(small_project, "run", "--env", "mine", "--pipelines", "data_prep", "--params", "all.segments=3").returncode == 0
    done = kedro(small_project, "run", "--env", "mine", "--params", "all.segments=3")
    assert done.returncode == 0, done.stderr
    assert (small_project / "data/mine/metrics_k2.json").exists() and not (small_project / "data/metrics_k2.json").exists()
