"""Settings: every choice composes and builds, every setting is explained, bad ones are refused by name."""

import importlib.util
import itertools
import math
import re
import shlex
import zipfile

import pytest
from programs import own_case

from biglearn_vae import PatchAE, config, count_parameters

CASES = ("tiny", "case1", "case2", "case3", "case4", "celeba")
PROGRAMS = ("train", "patch_ae", "benchmark", "evaluate", "complete", "figures", "probe", "reproduce")
METHODS = ("vae", "biglearn_t", "biglearn_u")
# DESIGN's table: the paper's counts are these over 2^20.
PARAMETERS = {"tiny": 182_948, "case1": 1_269_104, "case2": 4_962_928, "case3": 5_012_144, "case4": 24_125_744}
PARAMETERS["celeba"] = 94_311_168
DATA = {"tiny": "digits", "celeba": "celeba", "celeba_small": "celeba"}  # of each case; else mnist


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config.folder() / group).glob("*.yaml"))


def composed(*overrides: str):
    own = {"data=image_folder", "data=array_file"} & set(overrides)
    return config.compose([*overrides, "data.root=x"] if own else overrides)


def tokenizer(cfg):
    """That of these settings; where it is a PatchAE, one with fresh weights."""
    sizes = dict(image_size=cfg.data.image_size, patch_size=cfg.data.patch_size, channels=cfg.data.channels)
    return config.tokenizer(cfg, PatchAE(**sizes).state() if cfg.tokens.name == "patch_ae" else None)


@pytest.mark.parametrize(("case", "method"), list(itertools.product(CASES, METHODS)))
def test_every_case_and_method_builds_with_the_papers_count(case, method):
    cfg = config.compose([f"case={case}", f"method={method}", f"data={DATA.get(case, 'mnist')}"])
    net = config.network(cfg, tokenizer(cfg))
    assert count_parameters(net) == PARAMETERS[case]
    loss = config.objective(cfg)
    assert loss.prior == ("standard" if method == "vae" else "learned")
    assert loss.masks.joint == (1.0 if method == "vae" else cfg.masks.joint)


@pytest.mark.parametrize("group", ["data", "method", "case", "optim", "trainer", "tokens"])
def test_every_choice_composes_and_builds(group):
    for choice in choices(group):
        cfg = composed(f"{group}={choice}")
        config.network(cfg, tokenizer(cfg))
        config.objective(cfg)
        config.build(cfg.optim, "optim")


def test_the_cases_for_faces_take_them_unless_something_else_is_given():
    assert [config.compose([f"case={case}"]).data.name for case in ("celeba", "celeba_small")] == ["celeba"] * 2
    assert config.compose(["case=celeba_small", "data=mnist"]).data.name == "mnist"
    assert config.compose(["data=digits", "case=celeba_small"]).data.name == "digits"


def test_the_papers_optimizer_settings():
    for case, lr in {"case1": 1e-4, "case2": 1e-4, "case3": 1e-4, "case4": 2e-5}.items():
        optim = config.build(config.compose([f"case={case}"]).optim, "optim")
        assert (optim.lr, tuple(optim.betas), optim.eps, optim.schedule) == (lr, (0.0, 0.999), 1e-8, "constant")
        assert optim.muon_lr is None
    optim = config.build(config.compose(["case=celeba", "data=celeba"]).optim, "optim")
    assert (optim.lr, tuple(optim.betas), optim.eps, optim.schedule) == (1e-4, (0.9, 0.95), 1e-5, "cosine")
    assert config.compose(["case=celeba", "data=celeba"]).loss.beta == 0.001


def test_the_rate_of_muon_falls_with_the_root_of_the_width():
    def rate(*overrides):
        return config.build(config.compose(overrides).optim, "optim").muon_lr

    assert rate() == rate("case=tiny") == 0.012  # at width 64
    assert rate("case=case1", "optim=muon") == pytest.approx(0.012 / math.sqrt(2))  # 128
    assert rate("model.dim=1024") == 0.003
    assert rate("model.dim=1024", "optim.muon_lr=0.02") == 0.02
    assert config.build(config.compose(config_name="patch_ae").optim, "optim").muon_lr == 0.003


def test_every_setting_is_explained_in_a_line():
    for name in PROGRAMS:
        explained, text = config.explanations(name), config.help_text(name, [])
        for key, _ in config._raw_leaves(config.compose([], name)):
            assert explained.get(key), f"{key} has no comment behind it"
            assert f"  {key}=" in text
    explained = config.explanations()
    for group in ("data", "method", "case", "optim", "trainer"):
        for choice in choices(group):
            for key, _ in config._raw_leaves(config.compose([f"{group}={choice}"])):
                assert explained.get(key), f"{key} of {group}={choice} has no comment behind it"


def test_a_setting_is_explained_as_its_own_choice_has_it():
    for group, program in (("data", "train"), ("preset", "reproduce")):
        for choice in choices(group):
            text = config.help_text(program, [f"{group}={choice}"])
            for line in (config.folder() / group / f"{choice}.yaml").read_text().splitlines():
                setting, _, comment = line.strip().partition("  # ")
                key, _, value = setting.partition(":")
                if comment and value and key.isidentifier():
                    assert re.search(rf"  {group}\.(\w+\.)*{key}=.* {re.escape(comment)}$", text, re.MULTILINE), line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dim=wide", "model.dim must be a whole number, got 'wide'"),
        ("model.z_dim=0", "model: z_dim must be at least 1, got 0"),
        ("model.depth=[4,4]", "model.depth must be a whole number, got [4, 4]"),
        ("model.heads=3", "model: heads must divide dim, got heads=3 and dim=64"),
        ("+model.width=3", "model.width: there is no such setting"),
        (
            "masks.s_ratio=[0,1]",
            "masks: s_ratio must be 2 numbers in (0, inf), got [0, 1]: parameters",
        ),
        ("masks.t_ratio=1", "masks.t_ratio must be a list, each a number, got 1"),
        ("masks.joint=2", "masks: joint must be a number in [0, 1], got 2"),
        ("loss.beta=-1", "loss: beta must be a number in [0, inf), got -1"),
        ("loss.prior=flat", "loss: prior must be learned or standard, got 'flat'"),
        ("data.patch_size=3", "data: patch_size must divide the image"),
        ("data.channels=2", "data.channels must be 1 or 3, got 2"),
        ("optim.lr=0", "optim: lr must be a number in (0, inf), got 0"),
        ("optim.lr=fast", "optim.lr must be a number, got 'fast'"),
        ("optim.betas=[0.9]", "optim: betas must be 2 numbers in [0, 1), got [0.9]"),
        ("optim.schedule=step", "optim: schedule must be constant or cosine, got 'step'"),
    ],
)
def test_bad_settings_are_refused_by_name(override, expected):
    with pytest.raises(ValueError) as caught:
        cfg = config.compose([override])
        config.network(cfg, config.tokenizer(cfg))
        config.objective(cfg)
        config.build(cfg.optim, "optim")
    assert expected in str(caught.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_that_is_explained_can_be_given(program):
    keys = [key for key, _ in config._raw_leaves(config.compose([], program))]
    config.check([f"{key}=x" for key in keys if not key.endswith(".name")], program)


@pytest.mark.parametrize(
    "word",
    ["preset.settings.train=[]", "+preset.seeds.case1=[3]", "preset.more.vae.seed0.complete=[]", "hydra.verbose=true"],
)
def test_names_that_are_free_are_not_refused(word):
    config.check([word], "reproduce")


@pytest.mark.parametrize(
    ("words", "program", "expected"),
    [
        (["run=x", "data.root=x"], "figures", "data.root: there is no such setting; did you mean data_root"),
        (["data.root=x"], "train", "data.root: data=digits has no such setting, only data=array_file, data=celeba"),
        (["data=digits", "++data.root=x"], "train", "data.root: data=digits has no such setting"),
        (["tokens.run=x"], "train", "tokens.run: tokens=patchify has no such setting, only tokens=patch_ae"),
        (["+optim.rate=1"], "train", "optim.rate: there is no such setting"),
        (
            ["case=case9"],
            "train",
            "case must be one of case1, case2, case3, case4, celeba, celeba_small, tiny",
        ),
        (["preset=all"], "reproduce", "preset must be one of fashion_mnist, "),
        (["optim=null"], "train", "optim must be one of adamw, celeba, muon, paper, got null"),
        (["case="], "train", "got nothing"),
        (["method.name=vae"], "train", "method.name says what was chosen and chooses nothing: give method=vae"),
        (["case"], "train", "'case' cannot be read: expected NAME=VALUE"),
        (["masks.s_ratio=[1,"], "train", "cannot be read: expected NAME=VALUE"),
        (
            ["seed=1,2"],
            "train",
            "seed=1,2 gives several values: a sweep over them needs -m",
        ),
        (["trainer.steps=range(3)"], "train", "gives several values"),
        (["optim.betas=0.9,0.95"], "train", "a list is written 'optim.betas=[a,b]'"),
        (["method=vae"], "patch_ae", "method has no value of its own but holds method.name"),
        (["+optim=muon"], "train", "+optim=muon: of optim there is always one"),
        (["++optim=muon"], "train", "++optim=muon: of optim there is always one"),
        (["+seed=1"], "train", "there is something already at 'seed': seed=1 gives it another value"),
        (["=3"], "train", "'=3' cannot be read: expected NAME=VALUE"),
        (["evaluation.ratios={}"], "train", "evaluation.ratios is a list, got {}"),
        (["masks.s_ratio={a:1}"], "train", "masks.s_ratio is a list, got {'a': 1}"),
        (["run=x", "tasks={a:1}"], "complete", "tasks is a list, got {'a': 1}"),
        (
            ["preset.seeds.case1=[3]"],
            "reproduce",
            "no preset.seeds.case1 yet: +preset.seeds.case1=[3] adds it",
        ),
        (
            ["preset.seeds={tiny:[1],case1:[0]}"],
            "reproduce",
            "there is no preset.seeds.case1 yet: +preset.seeds.case1=... adds it",
        ),
        (
            ["evaluation={draws:3,drows:3}"],
            "train",
            "evaluation.drows: there is no such setting; did you mean evaluation.d",
        ),
        (
            ["preset=paper", "preset.grid={a:{b:[]}}"],
            "reproduce",
            "preset=paper has no such setting, only preset=fashion_mnist_causes, preset=hidden",
        ),
        (["~trainer.steps"], "train", "trainer.steps cannot be left out: it has its default unless a word gives it"),
        (["~data.name"], "train", "data.name cannot be left out"),
        (["~evaluation"], "train", "evaluation cannot be left out"),
        (["~preset.seeds"], "reproduce", "preset.seeds cannot be left out"),
        (["~preset.seeds.case9"], "reproduce", "there is no preset.seeds.case9 to be left out"),
        (["~draws"], "complete", "draws cannot be left out"),
        (["hydra.run.dir=x"], "train", "hydra.run.dir=x is Hydra's, which starts scripts"),
        (["hydra/launcher=basic"], "train", "hydra/launcher=basic is Hydra's, which starts scripts"),
    ],
)
def test_words_that_are_no_settings(words, program, expected):
    with pytest.raises(ValueError) as caught:
        config.compose(words, program)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ["~preset.seeds.tiny"],
        ["+preset.seeds={case1:[0]}"],
        ["preset.seeds={tiny:[3]}"],
        ["+preset.seeds={case1:[0],tiny:[1]}"],
    ],
)
def test_words_that_change_what_has_any_names(words):
    config.check(words, "reproduce")


@pytest.mark.parametrize("word", ["~optim=muon", "~trainer", "~case", "+optim@other=paper"])
def test_of_a_group_one_is_always_chosen(word):
    with pytest.raises(ValueError, match=f"^{re.escape(word)}: of [a-z]+ there is always one, and for all of "):
        config.compose([word])


def test_words_of_a_sweep():
    config.check(["case=case1,case2", "data=mnist,celeba", "data.root=x", "optim.lr=1e-3,1e-4"], sweep=True)
    config.check(["case=glob(*)", "seed=range(3)", "hydra/launcher=basic", "hydra.launcher.n_jobs=4"], sweep=True)
    for word, why in (
        ("case=glob(nope*)", r"case=glob\(nope\*\) chooses nothing of case1, .*, tiny"),
        ("seed=range(0)", r"seed=range\(0\) has no values"),
        ("seed=range(0,1,0)", r"seed=range\(0,1,0\): .* must not be zero"),
        ("seed=glob(*)", r"chooses nothing as seed is no group of settings: list its values, seed=A,B"),
    ):
        with pytest.raises(ValueError, match=why):
            config.check([word], sweep=True)
    with pytest.raises(ValueError, match=r"gives an interval, .* such as loss.beta=0.1,1 or 'loss.beta=range\(1,5\)'"):
        config.check(["loss.beta=interval(0.1,1)"], sweep=True)
    for words in (["case=case1,case9"], ["data=mnist,digits", "data.root=x"], ["optim.rate=1,2"]):
        with pytest.raises(ValueError, match=r"case9|data=digits has no such setting|optim\.rate: there"):
            config.check(words, sweep=True)


def test_a_setting_that_is_there_is_not_added_again():
    with pytest.raises(ValueError, match=r"already at 'optim\.lr'"):
        config.compose(["+optim.lr=1"])
    assert config.compose(["++optim.lr=1"]).optim.lr == 1
    with pytest.raises(ValueError, match="already at 'seed': seed=1,2 gives it another value"):
        config.check(["+seed=1,2"], sweep=True)


def test_what_hydra_adds_to_may_be_added_to():
    cfg = config.compose(["+name=first", "+binarize=threshold", "+masks.s_ratio=[1,1]"])
    assert cfg.name == "first" and cfg.binarize == "threshold" and cfg.masks.s_ratio == [1, 1]
    assert config.compose(["data=image_folder", "+data.root=x"]).data.root == "x"
    assert config.compose(["+run=x", "+tasks=[0.5]"], "complete").run == "x"


def test_weights_depend_on_the_seed_alone():
    first, again, other = (config.compose([f"seed={seed}"]) for seed in (0, 0, 1))
    weights = [config.network(cfg, config.tokenizer(cfg)).token_in.weight for cfg in (first, again, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_composing_inside_a_program_that_uses_hydra():
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(version_base="1.3", config_dir=str(config.folder())):
        assert config.compose(["case=case2"]).model.dim == 256
        assert compose("train", ["case=case1"]).model.dim == 128
    assert not GlobalHydra.instance().is_initialized()


def test_the_wheel_carries_the_configs(tmp_path):
    import subprocess
    import sys

    root = config.folder().parent
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    code = (
        "import biglearn_vae as blv; cfg = blv.compose(['case=case4', 'data=mnist']);"
        "print(blv.__file__, blv.config.folder(), cfg.model.dim)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    file, folder, dim = done.stdout.split()
    assert file.startswith(str(tmp_path)) and folder.startswith(str(tmp_path)) and dim == "512"


@pytest.mark.parametrize(
    ("group", "name", "extra"), [(group, *item) for group, extras in config.PLUGINS.items() for item in extras.items()]
)
def test_a_plugin_is_there_or_has_an_extra(group, name, extra):
    plugin = f"hydra_plugins.hydra_{name.split('_')[0]}_{group.split('/')[1]}"
    words = [f"{group}={name}"]
    if importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(plugin):
        return config.check(words, sweep=True)
    with pytest.raises(ValueError) as caught:
        config.check(words, sweep=True)
    assert f"got '{name}': pip install -e '.[{extra}]' adds it" in str(caught.value)


def test_a_plugin_that_there_is_not():
    with pytest.raises(ValueError, match="got 'slurm'; extras have joblib, submitit_local, submitit_slurm"):
        config.check(["hydra/launcher=slurm"])


@pytest.fixture
def own(tmp_path):
    """A folder of the user's own, of settings."""
    own_case(tmp_path, "wide", "model:\n  dim: 96  # a hundred or so\n")
    (tmp_path / "mine.yaml").write_text(
        "# All mine.\ndefaults:\n  - train\n  - override case: wide\n  - _self_\nseed: 7\n"
    )
    yield tmp_path
    config.search_also(None)


def test_settings_of_ones_own_folder_are_composed_checked_and_explained(own):
    with pytest.raises(ValueError, match=r"case must be one of case1, .*, tiny, got wide"):
        config.compose(["case=wide"])
    config.search_also(own)
    assert config.compose(["case=wide"]).model.dim == 96 and config.compose(["case=wide"]).model.z_dim == 16
    assert config.resolved(("case=wide",))["model.dim"] == 96
    with pytest.raises(ValueError, match=r"case must be one of case1, .*, tiny, wide, got wise"):
        config.compose(["case=wise"])
    with pytest.raises(ValueError, match=r"model\.dims: there is no such setting; did you mean model\.dim"):
        config.compose(["case=wide", "model.dims=3"])
    assert re.search(r"model\.dim=96 +a hundred or so\n", config.help_text("train", ["case=wide"]))
    mine = config.compose(config_name="mine")
    assert (mine.seed, mine.model.dim) == (7, 96)
    assert config.own_main_files(["train"]) == ["mine"] and not config.own_main_files(["evaluate"])
    shown = config.help_text("mine", [])
    assert shown.startswith("All mine.") and re.search(r"seed=7 +of the weights, .*\n", shown)
    config.search_also(None)
    with pytest.raises(ValueError, match="case must be one of"):
        config.resolved(("case=wide",))


def test_a_choice_of_ones_own_has_settings_of_its_own(own):
    (own / "optim").mkdir()
    lines = "_target_: torch.optim.SGD\nlr: 0.1  # what suits me\nmomentum: 0.5  # of the steps before\n"
    (own / "optim/sgd.yaml").write_text(lines)
    (own / "list.yaml").write_text("defaults: [train, _self_]\ndata:\n  image_size:\n    - list\n")
    config.search_also(own)
    with pytest.raises(ValueError, match=r"optim\.momentum: optim=muon has no such setting, only optim=sgd"):
        config.compose(["optim.momentum=0.3"])
    shown = config.help_text("train", ["optim=sgd"])
    assert re.search(r"lr=0\.1 +what suits me\n", shown) and "momentum=0.5" in shown
    assert re.search(r"optim\.lr=0\.002 +peak learning rate of AdamW\n", config.help_text("train", []))
    assert re.search(r"output_dir=outputs +folder", config.help_text("list", []))
    (own / "optim/other.yaml").write_text(lines.replace("0.5", "0.25"))
    config.search_also(own)  # what is new there is seen
    assert config.compose(["optim=other"]).optim.momentum == 0.25
    config.search_also(config.folder())
    assert config.folders() == [config.folder()]


def test_a_folder_of_ones_own_that_cannot_be_used(own):
    with pytest.raises(ValueError, match="--config-dir must name a folder, got elsewhere"):
        config.search_also("elsewhere")
    (own / "case/wide.yaml").write_text("# @package _global_\ndefaults:\n  - tiny\n")
    config.search_also(own)
    with pytest.raises(ValueError, match=r"case/wide\.yaml must have case\.name=wide: results go by it, got tiny"):
        config.compose(["case=wide"])
    with pytest.raises(ValueError, match=r"case/wide\.yaml must have case\.name=wide"):
        config.compose(config_name="mine")
    (own / "case/wide.yaml").write_text("case:\n  name: wide\n")
    config.search_also(own)
    with pytest.raises(ValueError, match=r"case\.name=wide, behind a first line # @package _global_: results go by it"):
        config.compose(["case=wide"])
    (own / "case/wide.yaml").write_text("# @package _global_\nmodel:\n  dim: [96\n")
    config.search_also(own)
    with pytest.raises(ValueError, match=r"case/wide\.yaml, line 4: expected"):
        config.compose(["case=wide"])
    config.search_also(None)
    (own / "case/tiny.yaml").write_text("")
    with pytest.raises(
        ValueError, match=r"tiny\.yaml has the name of one of this package, which would be read: rename it"
    ):
        config.search_also(own)
    assert config.folders() == [config.folder()]


@pytest.mark.parametrize(
    "lines, said",
    {
        "defaults: [tinyy]": "a defaults list has case/tinyy: case must be one of case1, .*, tiny, wide, got tinyy",
        "defaults: [tiny, {override /optim: sgd}]": "a defaults list has optim/sgd: optim must be one .*, got sgd",
        "defaults: [tiny, {/mine: own}]": "a defaults list has mine/own: there is no such file of settings",
        "defaults: [{override /optim: paper}, tiny]": "Override 'optim : paper' is defined before .* Overrides must be",
        "defaults: tiny": "Invalid defaults list in 'case/wide', defaults must be a list",
        "hydra:\n  sweeper:\n    parms: {seed: 1}": "In 'case/wide': ConfigKeyError .*: Key 'parms' not in",
        "- tiny": "In 'case/wide': ConfigTypeError .*: Cannot merge DictConfig with ListConfig",
        "# @package case\n- tiny": "case/wide.yaml must hold lines NAME: VALUE, got a list",
        "case:\n\tname: wide": "case/wide.yaml, line 3: found character",
    }.items(),
)
def test_what_is_wrong_with_a_file_of_ones_own_is_said_in_a_line(own, lines, said):
    (own / "case/wide.yaml").write_text(lines if lines[0] == "#" else f"# @package _global_\n{lines}\n")
    config.search_also(own)
    with pytest.raises(ValueError, match=said) as caught:
        config.compose(["case=wide"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "part, value",
    [
        *itertools.product(["case", "loss"], ["3"]),
        *itertools.product(["data", "evaluation", "loss", "masks", "method", "model", "optim", "trainer"], ["null"]),
    ],
)
def test_a_part_that_a_file_of_ones_own_makes_a_value_is_named(own, part, value):
    (own / "mine.yaml").write_text(f"defaults: [train, _self_]\n{part}: {value}\n")
    config.search_also(own)
    said = f"{part} must hold lines NAME: VALUE, got {'None' if value == 'null' else value}$"
    with pytest.raises(ValueError, match=said):
        config.compose(config_name="mine")


def test_names_of_ones_own_that_yaml_takes_for_others_than_words(own):
    (own / "optim").mkdir()
    (own / "optim/numbers.yaml").write_text("_target_: biglearn_vae.Optim\n1: 3\n")
    (own / "optim/nothing.yaml").write_text("lr: 0.1\n")
    (own / "mine.yaml").write_text("defaults: [train, _self_]\n1: 3\n")
    config.search_also(own)
    with pytest.raises(ValueError, match=r"optim: Optim takes lr, .*, not 1"):
        config.build(config.compose(["optim=numbers"]).optim, "optim")
    with pytest.raises(ValueError, match="optim must have a line _target_: MODULE"):
        config.build(config.compose(["optim=nothing"]).optim, "optim")
    assert config.as_dict(config.compose(config_name="mine"))["1"] == 3
    assert re.search(r"\b1=3\b", config.help_text("mine", []))


@pytest.mark.parametrize(
    "value",
    [
        "a/b.c-d_1",
        "my images",
        "out (1)",
        "a,b",
        "2024",
        "null",
        "1e3",
        "ünter",
        'a"b',
        "back\\slash",
        "end\\",
        "~/x",
        "a=b",
    ],
)
def test_words_are_read_as_they_were_meant(value):
    (override,) = config.parsed([config.word("data.root", value)])
    assert override.value() == value
    assert shlex.split(config.shell_word("data.root", value)) == [config.word("data.root", value)]
    assert config.word("a", [1, 2]) == "a=[1,2]" and config.word("a", None) == "a=null"


def test_settings_in_one_text_are_refused():
    with pytest.raises(ValueError, match=r"expected a list of settings, such as \['case=case1'\], got the text"):
        config.compose("case=case1")
    assert config.compose(word for word in ["seed=3"]).seed == 3  # which can be gone through once
