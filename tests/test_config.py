import pytest
from pydantic import ValidationError

from fastvae.training.config import ConfigError, TrainConfig


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
        ({"epochs": "many"}, "epochs: got 'many', expected a valid integer"),
        ({"epoch": 3}, "epoch: no such option; did you mean epochs?"),
        ({"zzz": 3}, "zzz: no such option"),
        ({"model": "rnn"}, "model: got 'rnn', expected 'mlp' or 'conv'"),
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
            for got in ([2, 1], [1], [1, 2, 3], ["-1", "a"], ["-inf", "0"], 4)
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
    with pytest.raises(ValueError, match=r"train\.toml: expected a TOML file"):
        TrainConfig.from_toml(path)
