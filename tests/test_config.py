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
