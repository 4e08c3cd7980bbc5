"""The generated reference pages cover every command, option, recipe key and public name."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load_generator():
    path = ROOT / "docs" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate_reference = load_generator()


def test_nothing_public_is_undocumented():
    assert generate_reference.find_undocumented() == []


def test_a_missing_help_text_is_found(monkeypatch):
    name, command = generate_reference.list_commands()[0]
    monkeypatch.setattr(command, "help", "")
    option = generate_reference.visible_parameters(command)[0]
    monkeypatch.setattr(option, "help", None)
    monkeypatch.setattr(generate_reference, "list_commands", lambda: [(name, command)])
    monkeypatch.setattr(generate_reference.robustsoup, "__all__", ["Recipe"])
    monkeypatch.setattr(generate_reference, "has_docstring", lambda name: False)
    missing = generate_reference.find_undocumented()
    spelling = generate_reference.option_spelling(option)
    for expected in (f"robustsoup {name}", f"robustsoup {name} {spelling}", "robustsoup.Recipe"):
        assert expected in missing


def test_every_command_and_option_is_on_the_page():
    page = generate_reference.render_commands()
    commands = generate_reference.list_commands()
    assert len(commands) >= 13
    for name, command in commands:
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in generate_reference.visible_parameters(command):
            assert f"`{generate_reference.option_spelling(parameter)}`" in section


def test_every_recipe_table_and_key_is_on_the_page():
    page = generate_reference.render_recipe_keys()
    tables = generate_reference.list_recipe_tables()
    names = {table for table, _ in tables}
    assert {"top", "pretrain", "finetune", "ingredients.NAME", "soups.NAME", "evaluate"} <= names
    assert {"pretrain.early_stop", "planes.NAME", "select", "report"} <= names
    for table, model in tables:
        title = "Top level" if table == "top" else f"`[{table}]`"
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert all(f"| `{key}` |" in section for key in model.model_fields)


def test_every_setting_and_registry_entry_is_on_a_page():
    page = generate_reference.render_settings()
    for settings_class in generate_reference.list_settings_classes():
        assert f"## {settings_class.__name__}" in page
        for name in generate_reference.settings.rules(settings_class):
            assert f"| `{name}` |" in page
    page = generate_reference.render_registries()
    for registry in generate_reference.list_registries():
        section = page.split(f"\n## {registry.name}\n")[1].split("\n## ")[0]
        assert all(entry.help in section for entry in registry.values())


def test_every_public_name_has_a_directive():
    page = generate_reference.render_python_names()
    for name in generate_reference.robustsoup.__all__:
        assert f":: robustsoup.{name}\n" in page


def test_pages_are_written_once(tmp_path):
    generate_reference.write_pages(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(before) == {"cli.md", "recipes.md", "settings.md", "catalog.md", "python.md"}
    generate_reference.write_pages(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
