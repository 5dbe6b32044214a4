"""Command line options made from the settings: one home for their names, their help and their defaults.

@app.command()
@with_settings(bundle=Annotated[str | None, typer.Argument(help="...")])
def serve(config: Annotated[Path | None, typer.Option(help="...")] = None, **flags: object) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer

from tta_edge.config import KEYS, parse_bundles
from tta_edge.settings import Setting, settings

BundleDirectory = Annotated[
    str | None,
    typer.Argument(
        metavar="BUNDLE", help="Directory of a bundle; without it the built-in one.", show_default=False
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of settings. Flags and TTA_* variables are stronger."),
]
HyperSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter, as lr=0.001 or tent.lr=0.001."),
]

NO_FLAG = frozenset({"hyper"})
"""Keys that the command line has in another form: --set."""

Command = TypeVar("Command", bound=Callable[..., Any])


def with_settings(keys: Iterable[str] = KEYS, **own: Any) -> Callable[[Command], Command]:
    """Give a command one option for each setting, in place of its `**flags`.

    Args:
        keys: of the settings.
        own: key -> annotation, where the option is not simply made from the setting.

    Returns:
        A decorator. The command gets key -> value in its `**flags`, None for what was not given.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        fixed = [
            each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for key, annotation in annotations_of(keys, own).items()
        ]
        fixed = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in fixed]
        # Arguments are shown before options whatever their place; the settings come first.
        parameters = [*made, *fixed]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
        return command

    return decorate


def annotations_of(keys: Iterable[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> the annotation that makes its option."""
    known = settings()
    return {key: own.get(key) or annotation(known[key]) for key in keys if key not in NO_FLAG}


def annotation(setting: Setting) -> Any:
    """The annotation of one setting's option. Values are checked later, with those of the other sources."""
    name, kind, metavar, text = setting.key.replace("_", "-"), setting.kind, None, help_of(setting)
    if setting.key == "bundles":
        name, kind, metavar, text = "bundle", list[str], "NAME=DIR", f"{text} May be repeated."
    flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    option = typer.Option(flag, help=text, metavar=metavar, show_default=False, rich_help_panel=setting.group)
    return Annotated[Optional[kind], option]  # noqa: UP045 - the kind is a value here


def help_of(setting: Setting) -> str:
    """Meaning and default of a setting in one text."""
    default, doc = setting.default, setting.doc
    if setting.choices:
        doc += f" One of {', '.join(setting.choices)}."
    if default is None or setting.kind is None:
        return doc
    if isinstance(default, bool):
        default = f"--{'' if default else 'no-'}{setting.key.replace('_', '-')}"
    return f"{doc} Default: {default}."


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.resolve` takes from the flags of a command made by `with_settings`.

    Raises:
        BadValue: `--bundle` without a name.
    """
    result = dict(flags)
    if result.get("bundles") is not None:
        result["bundles"] = parse_bundles(result["bundles"], "flag --bundle")
    return result
