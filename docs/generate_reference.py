"""Write the reference pages: commands, recipe keys, settings, registries and Python names.

Each `render_*` function reads the code and returns one page of Markdown. `find_undocumented`
names what has no help text; tests/docs/test_reference.py fails when the list is not empty.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import robustsoup
from robustsoup import catalog, settings
from robustsoup.cli import app
from robustsoup.recipes import Recipe

PYTHON_GROUPS = {
    "Data and networks": (
        "load_data",
        "load_model",
        "find_overlaps",
        "Data",
        "Split",
        "Synthetic",
        "Overlap",
    ),
    "Checkpoints": ("Checkpoint",),
    "Attacks": ("ThreatModel", "apgd", "apgd_train", "pgd", "square"),
    "Training": ("train", "train_subspace", "track", "Objective"),
    "Soups": ("mix", "merge", "learn", "learn_dial", "Coefficients", "Dial"),
    "Evaluation": ("evaluate", "Evaluation", "Accuracy", "compare", "Comparison"),
    "Search": (
        "search",
        "SearchResult",
        "Answer",
        "select",
        "pareto_front",
        "Candidate",
        "Selection",
    ),
    "Diagnosis": ("check", "Soupability", "landscape", "Landscape", "map_layers", "LayerMap"),
    "Settings": (
        "TrainSettings",
        "LearnSettings",
        "DialSettings",
        "EarlyStop",
        "AttackSettings",
        "BufferSettings",
        "MergeSettings",
        "SearchSettings",
        "LandscapeSettings",
    ),
    "Errors": ("RobustsoupError",),
}
"""The public names by theme, in the order of the page."""


def write_pages(folder: Path) -> None:
    """Write all generated pages; files whose text has not changed are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "cli.md": render_commands(),
        "recipes.md": render_recipe_keys(),
        "settings.md": render_settings(),
        "catalog.md": render_registries(),
        "python.md": render_python_names(),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def find_undocumented() -> list[str]:
    """Return every command, option, recipe key, setting, registry entry and name without help."""
    missing = [
        f"robustsoup {name}"
        for name, command in list_commands()
        if not (command.help or "").strip()
    ]
    missing += [
        f"robustsoup {name} {option_spelling(parameter)}"
        for name, command in list_commands()
        for parameter in visible_parameters(command)
        if not (getattr(parameter, "help", None) or "").strip()
    ]
    missing += [
        f"recipe key {table}.{name}".replace(".top.", ".")
        for table, model in list_recipe_tables()
        for name, field in model.model_fields.items()
        if not (field.description or "").strip()
    ]
    missing += [
        f"setting {settings_class.__name__}.{name}"
        for settings_class in list_settings_classes()
        for name, rule in settings.rules(settings_class).items()
        if not rule.help.strip()
    ]
    missing += [
        f"registry entry {registry.name}.{entry.name}"
        for registry in list_registries()
        for entry in registry.all_entries().values()
        if not entry.help.strip()
    ]
    missing += [f"robustsoup.{name}" for name in robustsoup.__all__ if not has_docstring(name)]
    listed = {name for names in PYTHON_GROUPS.values() for name in names}
    missing += [f"robustsoup.{name} (PYTHON_GROUPS)" for name in set(robustsoup.__all__) ^ listed]
    return missing


def has_docstring(name: str) -> bool:
    """Return whether a public name and its public methods carry docstrings."""
    public = getattr(robustsoup, name)
    documented = [public] if inspect.isclass(public) or inspect.isfunction(public) else []
    if inspect.isclass(public):
        documented += [
            member
            for key, member in vars(public).items()
            if not key.startswith("_") and isinstance(member, property | classmethod)
        ]
    return all((inspect.getdoc(item) or "").strip() for item in documented)


# Commands


def list_commands() -> list[tuple[str, Any]]:
    """Return (name, command) for every command, in the order of `robustsoup --help`."""
    return list(typer.main.get_command(app).commands.items())


def visible_parameters(command: Any) -> list[Any]:
    """Return the arguments and options of a command without --help."""
    return [
        parameter
        for parameter in command.params
        if "--help" not in parameter.opts and not getattr(parameter, "hidden", False)
    ]


def option_spelling(parameter: Any) -> str:
    """Return how a parameter is written: its flags, or the name of an argument."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def render_commands() -> str:
    """Return the command-line reference."""
    page = ["# Command line", "", app.info.help or "", ""]
    page += [
        "`robustsoup COMMAND --help` prints the same text. Exit codes: see",
        "[exit codes](../exit-codes.md).",
        "",
    ]
    for name, command in list_commands():
        page += [f"## {name}", "", *command_lines(name, command)]
    return "\n".join(page).rstrip() + "\n"


def command_lines(name: str, command: Any) -> Iterator[str]:
    """Yield usage, help text and a table of parameters of one command."""
    arguments = " ".join(
        option_spelling(p) + ("..." if p.nargs == -1 else "")
        for p in command.params
        if p.param_type_name == "argument"
    )
    yield from ("```text", f"robustsoup {name} {arguments} [OPTIONS]".replace("  ", " "), "```", "")
    yield from (inspect.cleandoc(command.help or ""), "")
    parameters = visible_parameters(command)
    if parameters:
        yield from ("| parameter | default | meaning |", "|---|---|---|")
        for parameter in parameters:
            spelling = table_cell(f"`{option_spelling(parameter)}`")
            yield f"| {spelling} | {default_text(parameter)} | {parameter_help(parameter)} |"
        yield ""


def default_text(parameter: Any) -> str:
    """Return the default of a command-line parameter for a table cell."""
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or callable(default) or default in ((), [], ""):
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    return table_cell(f"`{default}`")


def parameter_help(parameter: Any) -> str:
    """Return the help of a parameter for a table cell, with a note where it repeats."""
    repeats = getattr(parameter, "multiple", False) and "repeatable" not in (parameter.help or "")
    return table_cell((parameter.help or "") + (" Repeatable." if repeats else ""))


# Recipes


def list_recipe_tables() -> list[tuple[str, type[BaseModel]]]:
    """Return (table, model) for the top level of a recipe and every table in it."""
    tables: list[tuple[str, type[BaseModel]]] = [("top", Recipe)]
    for name, field in Recipe.model_fields.items():
        for model in find_models(field.annotation):
            named = "dict" in str(field.annotation)
            tables.append((f"{name}.NAME" if named else name, model))
    nested = [
        (f"{table}.{name}", model)
        for table, parent in tables[1:]
        for name, field in parent.model_fields.items()
        for model in find_models(field.annotation)
    ]
    return tables + nested


def find_models(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that an annotation mentions."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in find_models(inner)]


def render_recipe_keys() -> str:
    """Return the reference of every table and key of a recipe."""
    page = [
        "# Recipe keys",
        "",
        "A recipe is a TOML file. An unknown key is an error that names the nearest known key.",
        '`extends = "other.toml"`, or a list of files, takes over what those files say, table by',
        "table. Paths are relative to the recipe. See",
        "[how to write a recipe](../../how-to/recipes.md).",
        "",
    ]
    for table, model in list_recipe_tables():
        page += [f"## {'Top level' if table == 'top' else f'`[{table}]`'}", ""]
        page += [inspect.cleandoc(model.__doc__ or ""), "", "| key | type | default | meaning |"]
        page += ["|---|---|---|---|"]
        page += [recipe_row(name, field) for name, field in model.model_fields.items()]
        page += [""]
    return "\n".join(page).rstrip() + "\n"


def recipe_row(name: str, field: FieldInfo) -> str:
    """Return the table row of one recipe key."""
    models = find_models(field.annotation)
    kind = "table" if models else type_text(field.annotation)
    default = "required" if field.is_required() else value_text(field.get_default())
    return f"| `{name}` | {table_cell(kind)} | {default} | {table_cell(field.description or '')} |"


def type_text(annotation: Any) -> str:
    """Return a type as a reader of TOML writes it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(type_text(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin is tuple:
        return f"list of {type_text(arguments[0])}s"
    if origin in (dict, Mapping):
        return "table"
    names = {int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation, "string")  # threat models, scores and requirements are text


def value_text(value: Any) -> str:
    """Return a default for a table cell, in TOML's spelling where it has one."""
    if value is None or isinstance(value, BaseModel) or value in ((), [], {}):
        return ""
    if dataclasses.is_dataclass(value):
        return table_cell(f"`{value}`")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return table_cell(f"`[{', '.join(map(toml_text, value))}]`")
    if isinstance(value, dict):
        items = ", ".join(f"{key} = {toml_text(item)}" for key, item in value.items())
        return f"`{{ {items} }}`"
    return table_cell(f"`{toml_text(value)}`")


def toml_text(value: Any) -> str:
    """Return a scalar or list as TOML."""
    return f'"{value}"' if isinstance(value, str) else str(value)


# Settings and registries


def list_settings_classes() -> list[type]:
    """Return the settings classes of robustsoup.settings, in the order of the file."""
    return [
        value
        for value in vars(settings).values()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and value.__module__ == settings.__name__
        and value is not settings.Rule
    ]


def render_settings() -> str:
    """Return the reference of the settings classes, which Python, recipes and commands share."""
    page = [
        "# Settings",
        "",
        "Each setting is declared once, in `robustsoup/settings.py`. Python functions take them as",
        "keyword arguments, recipes as keys, commands as options (`batch_size` is `--batch-size`).",
        "",
    ]
    for settings_class in list_settings_classes():
        page += [
            f"## {settings_class.__name__}",
            "",
            inspect.cleandoc(settings_class.__doc__ or ""),
        ]
        page += ["", "| setting | default | range | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(settings_class):
            rule = field.metadata["rule"]
            cells = (f"`{field.name}`", value_text(field.default), range_text(rule), rule.help)
            page.append(f"| {' | '.join(table_cell(cell) for cell in cells)} |")
        page.append("")
    return "\n".join(page).rstrip() + "\n"


def range_text(rule: settings.Rule) -> str:
    """Return the valid range of a setting, or nothing where every value is valid."""
    bounds = (rule.ge, rule.gt, rule.le, rule.lt, rule.choices)
    return "" if all(bound is None for bound in bounds) else rule.describe_range()


def list_registries() -> list[catalog.Registry]:
    """Return the registries of robustsoup.catalog, in the order of the file."""
    return [value for value in vars(catalog).values() if isinstance(value, catalog.Registry)]


def render_registries() -> str:
    """Return the reference of what can be chosen by name."""
    page = [
        "# What can be chosen by name",
        "",
        "The registries of `robustsoup/catalog.py`. [How to add an entry](../../extending.md).",
        "",
    ]
    for registry in list_registries():
        page += [f"## {registry.name}", "", "| name | meaning | source |", "|---|---|---|"]
        for entry in registry.values():
            spelling = entry.spelling or f"`{entry.name}`"
            cells = (spelling, entry.help, entry.source)
            page.append(f"| {' | '.join(table_cell(cell) for cell in cells)} |")
        page.append("")
    return "\n".join(page).rstrip() + "\n"


# Python


def render_python_names() -> str:
    """Return the API reference: autodoc directives for every public name."""
    page = ["# Python", "", "`import robustsoup as rs`; every name below is `rs.NAME`.", ""]
    for group, names in PYTHON_GROUPS.items():
        page += [f"## {group}", ""]
        for name in names:
            page += [f"### {name}", "", "```{eval-rst}", *autodoc_lines(name), "```", ""]
    return "\n".join(page).rstrip() + "\n"


def autodoc_lines(name: str) -> list[str]:
    """Return the autodoc directive of one public name."""
    public = getattr(robustsoup, name)
    if not inspect.isclass(public):
        return [f".. autofunction:: robustsoup.{name}"]
    lines = [f".. autoclass:: robustsoup.{name}", "   :members:"]
    if dataclasses.is_dataclass(public):  # the class docstring documents the fields
        fields = ", ".join(field.name for field in dataclasses.fields(public))
        lines.append(f"   :exclude-members: {fields}")
    return lines + (["   :show-inheritance:"] if issubclass(public, Exception) else [])


def table_cell(text: str) -> str:
    """Return text that fits into one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
