import argparse

import pytest
import tomli_w
from pydantic import ValidationError

from fastvae.cli.options import add_train_options, train_config
from fastvae.training.config import ConfigError, ConfigFileError, TrainConfig

# of each option: a value for a file, what is typed on the command line, and the value which that means
VALUES = {
    "data": ("digits", ["a b.npy"], "a b.npy"),
    "val": ("val.npy", ["0.25"], 0.25),
    "image_size": (64, ["32"], 32),
    "hflip": (True, False, False),
    "crop_padding": (4, ["2"], 2),
    "binarize": (True, False, False),
    "normalize_counts": ("median", ["1e4"], 1e4),
    "log1p": (True, False, False),
    "model": ("conv", ["mlp"], "mlp"),
    "hidden": ((64, 32), ["16"], (16,)),
    "latent_dim": (3, ["4"], 4),
    "likelihood": ("gaussian", ["bernoulli"], "bernoulli"),
    "variance": (0.5, ["learned"], "learned"),
    "beta": (0.5, ["2"], 2.0),
    "kl_warmup": ("linear", ["cosine"], "cosine"),
    "kl_warmup_steps": (30, ["40"], 40),
    "free_bits": (0.5, ["0.25"], 0.25),
    "free_bits_form": ("element", ["batch"], "batch"),
    "capacity": (25.0, ["5"], 5.0),
    "capacity_steps": (100, ["200"], 200),
    "logvar_clamp": ((-8, 8), ["-9", "9.5"], (-9, 9.5)),
    "epochs": (3, ["4"], 4),
    "patience": (3, ["4"], 4),
    "batch_size": (32, ["64"], 64),
    "accumulate": (2, ["4"], 4),
    "checkpoint_activations": (True, False, False),
    "channels_last": (True, False, False),
    "lr": (0.01, ["1e-4"], 1e-4),
    "lr_schedule": ("cosine", ["constant"], "constant"),
    "lr_warmup_steps": (5, ["6"], 6),
    "optimizer": ("adamw", ["adam"], "adam"),
    "weight_decay": (0.1, ["0.2"], 0.2),
    "clip_norm": (5.0, ["6"], 6.0),
    "non_finite": ("skip", ["stop"], "stop"),
    "max_skipped_steps": (5, ["6"], 6),
    "ema_decay": (0.99, ["0.9"], 0.9),
    "amp": (True, False, False),
    "cuda_graph": ("never", ["always"], "always"),
    "device": ("cpu", ["cuda"], "cuda"),
    "seed": (2**40, ["7"], 7),
    "out": ("a b/c", ["d"], "d"),
    "overwrite": (True, False, False),
    "checkpoint_steps": (100, ["200"], 200),
    "image_epochs": (2, ["3"], 3),
    "weights_epochs": (2, ["3"], 3),
    "report": (False, True, True),
    "tensorboard": (True, False, False),
    "download": (True, False, False),
    "debug": (True, False, False),
}
# what an option needs beside it
BESIDE = {
    "kl_warmup_steps": {"kl_warmup": "linear"},
    "free_bits_form": {"free_bits": 0.5},
    "capacity_steps": {"capacity": 25.0},
    "max_skipped_steps": {"non_finite": "skip"},
    "weight_decay": {"optimizer": "adamw"},
}


def _typed(name, strings):
    """The command line for a value; of a boolean, for its opposite."""
    flag = name.replace("_", "-")
    if isinstance(strings, bool):
        return [f"--{flag}" if strings else f"--no-{flag}"]
    return [f"--{flag}", *strings]


def _resolved(command_line, tmp_path, file=None):
    """The options of a command line, with a file of options before it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_train_options(parser)
    if file is not None:
        (tmp_path / "options.toml").write_text(tomli_w.dumps(file))
        command_line = ["--config", str(tmp_path / "options.toml"), *command_line]
    return train_config(parser.parse_args(command_line))


def test_every_option_has_values_here():
    """A new option goes into VALUES (and BESIDE, if it needs another)."""
    assert list(VALUES) == list(TrainConfig.model_fields)


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_goes_before_the_file_and_the_file_before_the_default(name, tmp_path):
    in_file, strings, expected = VALUES[name]
    default = TrainConfig.model_fields[name].default
    beside = BESIDE.get(name, {})
    file = {**beside, name: in_file}
    found = [
        getattr(_resolved(command_line, tmp_path, given), name)
        for command_line, given in (
            ([], None), ([], {}), ([], beside), ([], file), (_typed(name, strings), file),
            (_typed(name, strings), beside),
        )
    ]  # fmt: skip
    assert found == [default, default, default, in_file, expected, expected]
    assert in_file not in (default, expected)


@pytest.mark.parametrize("name", [n for n in VALUES if TrainConfig.model_fields[n].default is None])
def test_no_name_takes_back_what_the_file_says(name, tmp_path):
    in_file, strings, expected = VALUES[name]
    beside = BESIDE.get(name, {})
    off = "--no-" + name.replace("_", "-")
    assert _resolved([off], tmp_path, {**beside, name: in_file}) == TrainConfig(**beside)
    # the last one holds
    for command_line, value in (
        ([off, *_typed(name, strings)], expected), ([*_typed(name, strings), off], None),
    ):  # fmt: skip
        assert getattr(_resolved(command_line, tmp_path, {**beside, name: in_file}), name) == value


@pytest.mark.parametrize(
    "left_out", [("capacity", "capacity_steps"), ("free_bits", "free_bits_form", "accumulate")]
)
def test_a_toml_with_every_option_comes_back(left_out, tmp_path):
    """In two parts, for free bits and a capacity exclude each other."""
    given = {name: in_file for name, (in_file, _, _) in VALUES.items() if name not in left_out}
    given |= {"model": "mlp"}  # for hidden
    if "free_bits" in given:
        given |= {"free_bits_form": "element"}  # for accumulate
    config = _resolved([], tmp_path, given)
    assert config.model_dump() == TrainConfig().model_dump() | given
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml())
    assert TrainConfig.from_toml(again) == config
    assert _resolved(["--config", str(again)], tmp_path) == config
    assert len(again.read_text().splitlines()) >= len(given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epoch = 3", "epoch: no such option; did you mean epochs?"),
        ("latent-dim = 3", "latent-dim: no such option; did you mean latent_dim?"),
        ("[train]\nepochs = 3", "train: no such option"),
        ('epochs = "3"', "epochs: got '3', expected a valid integer"),
        ("epochs = 3.0", "epochs: got 3.0, expected a valid integer"),
        ("epochs = true", "epochs: got True, expected a valid integer"),
        ("epochs = [3]", "epochs: got [3], expected a valid integer"),
        ('lr = "1e-3"', "lr: got '1e-3', expected a valid number"),
        ("lr = nan", "lr: got nan, expected a finite number"),
        ("lr = true", "lr: got True, expected a valid number"),
        ("amp = 1", "amp: got 1, expected a valid boolean"),
        ('amp = "yes"', "amp: got 'yes', expected a valid boolean"),
        ("out = 3", "out: got 3, expected a valid string"),
        ("data = 2020-01-01", "data: got datetime.date(2020, 1, 1), expected a valid string"),
        ('hidden = ["400"]', "hidden: got '400', expected a valid integer"),
        ("hidden = 400", "hidden: got 400, expected a valid list"),
        ('logvar_clamp = ["-1", 1]', "logvar_clamp: got '-1', expected a valid number"),
        ('variance = "0.5"', "variance: got '0.5', expected a valid number"),
        ("val = true", "val: got True, expected a fraction between 0 and 1, or a file"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(line, message, tmp_path):
    path = tmp_path / "options.toml"
    path.write_text(line)
    with pytest.raises(ConfigFileError) as error:
        TrainConfig.from_toml(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("option", ["data", "val", "out"])
def test_a_path_that_is_no_text_is_refused_before_a_run_begins(option, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{option}: got 'images\\udcff', expected UTF-8"):
        _resolved([f"--{option}", "images\udcff"], tmp_path)


def test_a_wrong_flag_beside_a_good_file_does_not_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"^epochs: got '0'"):
        _resolved(["--epochs", "0"], tmp_path, {"epochs": 3})


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(data="digits", hidden=(64, 32), epochs=3, lr=1e-4, amp=True, seed=2**40, out="a b/c"),
        TrainConfig(likelihood="gaussian", variance=0.1, val="other.npy", model="conv", device="cpu"),
        TrainConfig(likelihood="gaussian", variance="learned", beta=0.0, val=0.25, optimizer="adamw"),
        TrainConfig(
            lr_schedule="cosine", lr_warmup_steps=5, clip_norm=1.0, optimizer="adamw", weight_decay=0.0
        ),
        TrainConfig(kl_warmup="cyclical", kl_warmup_steps=40, free_bits=0.0, free_bits_form="element"),
        TrainConfig(non_finite="skip", max_skipped_steps=3, ema_decay=0.999, patience=2),
        TrainConfig(capacity=25.0, capacity_steps=1000, beta=100.0),
        TrainConfig(accumulate=4, checkpoint_activations=True, channels_last=True, model="conv"),
        TrainConfig(accumulate=2, free_bits=0.1, free_bits_form="element"),
        TrainConfig(kl_warmup="linear", logvar_clamp=(-10, 10.5), free_bits=0.5),
    ],
)
def test_toml_gives_back_the_same_options(config, tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(config.to_toml())
    assert TrainConfig.from_toml(path) == config


def test_strings_are_read_as_the_command_line_gives_them():
    config = TrainConfig(
        epochs="3", lr="1e-4", hidden=["64", "32"], val="0.2", likelihood="gaussian", variance="0.5"
    )
    assert (config.epochs, config.lr, config.hidden) == (3, 1e-4, (64, 32))
    assert (config.val, config.variance) == (0.2, 0.5)
    config = TrainConfig(logvar_clamp=["-10", "1e1"], free_bits="0.1", clip_norm="5", lr_warmup_steps="7")
    assert (config.logvar_clamp, config.free_bits) == ((-10, 10), 0.1)
    assert (config.clip_norm, config.lr_warmup_steps) == (5, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": "-1"}, "epochs: got '-1', expected a number greater than or equal to 1"),
        *(
            ({name: 2**62 + 1}, f"{name}: got {2**62 + 1}, expected a number less than or equal to {most}")
            for name, most in (("batch_size", 2**62), ("latent_dim", 2**31 - 1))
        ),
        (
            {"hidden": ["9" * 30]},
            f"hidden: got '{'9' * 30}', expected a number less than or equal to 2147483647",
        ),
        ({"epochs": "many"}, "epochs: got 'many', expected a valid integer"),
        ({"epoch": 3}, "epoch: no such option; did you mean epochs?"),
        ({"zzz": 3}, "zzz: no such option"),
        ({"model": "rnn"}, "model: got 'rnn', expected 'mlp', 'conv' or package.module:Class"),
        ({"hidden": ["400", "0"]}, "hidden: got '0', expected a number greater than or equal to 1"),
        ({"lr": "nan"}, "lr: got 'nan', expected a finite number"),
        ({"beta": -1.0}, "beta: got -1.0, expected a number greater than or equal to 0"),
        ({"val": "1"}, "val: got '1', expected a fraction between 0 and 1, or a file"),
        ({"val": 0}, "val: got 0, expected a fraction between 0 and 1, or a file"),
        ({"variance": "0"}, "variance: got '0', expected a number above 0, or 'learned'"),
        (
            {"variance": 0.5, "likelihood": "mse"},
            "variance: got 0.5 with likelihood mse, expected it with gaussian only",
        ),
        ({"lr_schedule": "step"}, "lr_schedule: got 'step', expected 'constant' or 'cosine'"),
        (
            {"kl_warmup": "cycle"},
            "kl_warmup: got 'cycle', expected 'none', 'linear', 'cosine' or 'cyclical'",
        ),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps: got -1, expected a number greater than or equal to 0"),
        ({"clip_norm": "0"}, "clip_norm: got '0', expected a number greater than 0"),
        ({"clip_norm": "inf"}, "clip_norm: got 'inf', expected a finite number"),
        ({"free_bits": -0.1}, "free_bits: got -0.1, expected a number greater than or equal to 0"),
        *(
            (
                {"logvar_clamp": got},
                f"logvar_clamp: got {got}, expected two numbers, LOW and HIGH, LOW not above HIGH",
            )
            for got in ([2, 1], [1], [1, 2, 3], ["-1", "a"], ["-inf", "0"], ["1e39", "1e300"], 4)
        ),
        (
            {"weight_decay": 0.1},
            "weight_decay: got 0.1 with optimizer adam, expected it with adamw only; use optimizer adamw",
        ),
        (
            {"kl_warmup_steps": 10},
            "kl_warmup_steps: got 10 with kl_warmup none, expected it with linear, cosine or cyclical",
        ),
        (
            {"kl_warmup_steps": 1, "kl_warmup": "cyclical"},
            "kl_warmup_steps: got 1 with kl_warmup cyclical, expected at least 2 a cycle",
        ),
        (
            {"free_bits_form": "element"},
            "free_bits_form: got element without free_bits, expected it with free_bits only",
        ),
        ({"capacity": -1}, "capacity: got -1, expected a number greater than or equal to 0"),
        ({"capacity": 5.0, "free_bits": 0.1}, "capacity: got 5 with free_bits 0.1, expected one of the two"),
        ({"capacity_steps": 5}, "capacity_steps: got 5 without capacity, expected both"),
        ({"accumulate": 0}, "accumulate: got 0, expected a number greater than or equal to 1"),
        ({"accumulate": 129}, "accumulate: got 129 with batch_size 128, expected at most one part a datum"),
        (
            {"accumulate": 2, "free_bits": 0.1},
            "accumulate: got 2 with free_bits, expected 1, since that takes the KL of a whole batch",
        ),
        (
            {"accumulate": 2, "capacity": 5.0},
            "accumulate: got 2 with capacity, expected 1, since that takes the KL of a whole batch",
        ),
        ({"patience": 0}, "patience: got 0, expected a number greater than or equal to 1"),
        ({"ema_decay": "1"}, "ema_decay: got '1', expected a number less than 1"),
        ({"non_finite": "ignore"}, "non_finite: got 'ignore', expected 'stop' or 'skip'"),
        (
            {"max_skipped_steps": 3},
            "max_skipped_steps: got 3 with non_finite stop, expected it with skip only",
        ),
        ({"hidden": [400], "model": "conv"}, "hidden: got 400 with model conv, expected it with mlp only"),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        TrainConfig(**options)
    assert str(error.value) == message
    assert error.value.option == next(iter(options))


def test_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().epochs = 3


def test_replace_validates():
    assert TrainConfig(lr=0.1).replace(epochs=3) == TrainConfig(lr=0.1, epochs=3)
    with pytest.raises(ConfigError, match="epochs"):
        TrainConfig().replace(epochs=0)


def test_a_file_that_is_not_toml(tmp_path):
    path = tmp_path / "train.toml"
    path.write_text("epochs = = 3")
    with pytest.raises(ConfigFileError, match=r"train\.toml: expected a TOML file"):
        TrainConfig.from_toml(path)
