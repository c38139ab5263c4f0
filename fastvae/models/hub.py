"""Models to share: save_pretrained, from_pretrained and push_to_hub, by huggingface_hub's ModelHubMixin.

A folder that they write is one for `fastvae.load` too, and a run's folder is one for them. Weights are
safetensors; nothing is pickled or unpickled.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from .vae import VAE

FILES = ("config.json", "model.safetensors")
DATASETS = {"fashion-mnist": "zalando-datasets/fashion_mnist", "mnist": "ylecun/mnist"}  # on the Hub
PICTURES = ("samples.png",)  # made up: nothing of the training data goes with the model unasked
UNKNOWN = "unknown"  # the Hub's word for a licence that is not stated


class HubError(RuntimeError):
    """The package huggingface_hub is absent; the message says how to get it."""


class Hub:
    """The part of a VAE that goes to and comes from a folder or the Hugging Face Hub."""

    _run: Path | None = None  # the folder that the model was loaded from

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, license: str = UNKNOWN, **options: Any
    ) -> str | None:
        """Write the model into a folder: config.json, model.safetensors and a model card, README.md.

        The card says what summary.json and evaluation.json of the model's run say, if it is still the model
        that `fastvae.load` has read there. One that exists is left as it is.

        license: of the model, by the Hub's names: "mit", "cc-by-4.0". options: those of huggingface_hub's
        ModelHubMixin.save_pretrained: `push_to_hub=True` with `repo_id=` uploads it too, and returns the
        address of the commit.

        Raises ValueError for a model that is not VAE.mlp or VAE.conv, HubError without huggingface_hub.
        """
        _check(self)
        name = options.get("repo_id") or Path(save_directory).resolve().name
        return cast("str | None", _mixin()(self, name, license).save_pretrained(save_directory, **options))

    def push_to_hub(self, repo_id: str, *, license: str = UNKNOWN, **options: Any) -> str:
        """Upload the model and its card to `repo_id`, "name/model"; returns the address of the commit.

        options: those of huggingface_hub's ModelHubMixin.push_to_hub: private, token, branch, create_pr,
        commit_message. Raises what save_pretrained does, and huggingface_hub's own errors.
        """
        _check(self)
        return cast(str, _mixin()(self, repo_id, license).push_to_hub(repo_id, **options))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Any) -> VAE:
        """The model in a folder or in a repository of the Hub, in eval mode, on the CPU.

        options: those of huggingface_hub's ModelHubMixin.from_pretrained: revision, token, cache_dir,
        force_download, local_files_only. Raises ModelFilesError for files that are not those of a model of
        fastvae, and for the Hub HubError without huggingface_hub, and huggingface_hub's own errors.
        """
        from .files import load

        if os.path.isdir(name_or_path):
            return load(name_or_path)
        return cast("VAE", _mixin().from_pretrained(str(name_or_path), **options).model)


def _check(model: Hub) -> None:
    """Before anything is written: the mixin takes config.json away first."""
    if cast("VAE", model).config is None:
        hint = "share its code with config.json and model.safetensors, for fastvae.load(run, model=Class)"
        raise ValueError(
            f"model: has an encoder and a decoder of its own, expected VAE.mlp or VAE.conv; {hint}"
        )


@cache
def _mixin() -> Any:
    """ModelHubMixin around a VAE: huggingface_hub takes long to import, and few need it."""
    try:
        from huggingface_hub import ModelHubMixin, hf_hub_download
    except ImportError as error:
        problem = "huggingface_hub is not installed, expected it for models to share"
        raise HubError(f"{problem}; install it with: pip install huggingface_hub") from error

    class Shared(ModelHubMixin, library_name="fastvae"):
        def __init__(self, model: VAE, name: str, license: str) -> None:
            self.model = model
            self.license = license
            self.name = name
            self.facts = _facts(model)

        def _save_pretrained(self, save_directory: Path) -> None:
            from .files import save

            save(self.model, save_directory)
            for picture in self.facts.get("pictures", ()):
                if picture.parent.resolve() != save_directory.resolve():
                    shutil.copyfile(picture, save_directory / picture.name)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Shared:
            from .files import load

            at = {key: options[key] for key in ("revision", "cache_dir", "force_download", "token")}
            at["local_files_only"] = options["local_files_only"]
            for name in FILES:
                path = hf_hub_download(model_id, name, **at)
            return cls(load(Path(path).parent), model_id, UNKNOWN)

        def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
            return _card(self.model, self.name, self.license, self.facts)

    return Shared


def _facts(model: VAE) -> dict[str, Any]:
    """What the run of a model says of it: nothing where its weights are not those of the run any more."""
    from .files import WEIGHTS_NAME, read_json

    run = model._run
    if run is None or not (run / WEIGHTS_NAME).is_file():
        return {}
    weights, state = safetensors.torch.load_file(run / WEIGHTS_NAME), model.state_dict()
    if not (weights.keys() == state.keys() and all(torch.equal(weights[k], state[k].cpu()) for k in weights)):
        return {}
    facts: dict[str, Any] = {}
    for name in ("summary", "evaluation"):
        facts[name] = read_json(run / f"{name}.json")
    options = run / "train.toml"
    facts["options"] = tomllib.loads(options.read_text()) if options.is_file() else {}
    facts["pictures"] = [run / name for name in PICTURES if (run / name).is_file()]
    return facts


def _card(model: VAE, name: str, license: str, facts: Mapping[str, Any]) -> ModelCard:
    """The model card: what the model is, how it was made, how good it is, and how it is used."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    config = model.config or {}
    summary, evaluation = facts.get("summary", {}), facts.get("evaluation", {})
    options = facts.get("options", {})
    title = name.rpartition("/")[2]
    data = (
        Path(options["data"]).name if "data" in options else None
    )  # of a path no more than anybody may know
    dataset = DATASETS.get(data or "")
    results = _results(summary, evaluation)
    is_image = len(config["item_shape"]) == 3
    card_data = ModelCardData(
        license=license,
        library_name="fastvae",
        tags=["vae", "variational-autoencoder"],
        pipeline_tag="unconditional-image-generation" if is_image else None,
        datasets=dataset,
        model_name=title if results and data else None,
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation" if is_image else "other",
                dataset_type=dataset or "other",
                dataset_name=data,
                metric_type=metric,
                metric_name=f"{name_of_metric}, {unit}",
                metric_value=value,
            )
            for metric, name_of_metric, value, unit in results
        ]
        if results and data
        else None,
    )
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = templates.get_template("model_card.md.j2").render(
        title=title,
        name=name,
        config=config,
        parameters=sum(p.numel() for p in model.parameters()),
        variance=_variance(model),
        data=data,
        options=options,
        summary=summary,
        evaluation=evaluation,
        results=results,
        license=None if license == UNKNOWN else license,
        pictures=[path.name for path in facts.get("pictures", ())],
    )
    whole = "---\n{{ card_data }}\n---\n\n{{ text }}"
    card: ModelCard = ModelCard.from_template(card_data, template_str=whole, text=text)
    return card


def _variance(model: VAE) -> float | None:
    if model.likelihood != "gaussian":
        return None
    return torch.as_tensor(model.log_variance).detach().exp().item()


def _results(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[tuple[str, str, float, str]]:
    """How good the model is known to be: keys, names, values, units; by the evaluation where there is one."""
    source, names = (evaluation, _OF_EVALUATION) if evaluation else (summary, _OF_SUMMARY)
    found = [(key, name, source.get(key), unit) for key, name, unit in names]
    return [(key, name, value, unit) for key, name, value, unit in found if isinstance(value, (int, float))]


_OF_EVALUATION = (
    ("elbo", "ELBO", "nats a datum"),
    ("log_likelihood", "Log-likelihood, importance-weighted bound", "nats a datum"),
    ("bits_per_dimension", "Bits per dimension", "bits"),
    ("kl", "KL term", "nats a datum"),
    ("active_units", "Active units", "latents"),
    ("mean_squared_error", "Mean squared error of reconstructions", "a value"),
)
_OF_SUMMARY = (
    ("test_loss", "Test loss at beta = 1", "nats a datum"),
    ("test_recon", "Test reconstruction term", "nats a datum"),
    ("test_kl", "Test KL term", "nats a datum"),
    ("val_loss", "Validation loss", "nats a datum"),
    ("active_units", "Active units on validation data", "latents"),
)
