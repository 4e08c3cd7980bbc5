"""Code in the current folder that a command names."""

import pytest

from robustsoup.errors import RequestError
from robustsoup.user_code import import_named_module


@pytest.mark.parametrize(
    ("module", "code", "text"),
    [
        ("here_a", "def load(:", 'module "here_a" cannot be imported: SyntaxError'),
        ("here_b", "import no_such_library", 'module "no_such_library" cannot be found'),
    ],
)
def test_the_cause_of_a_failing_import_is_named(tmp_path, monkeypatch, module, code, text):
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=text):
        import_named_module(f"{module}:load")


@pytest.mark.parametrize("spec", [None, "resnet9", "no_such_module:load", "timm:resnet18", ":x"])
def test_other_names_are_left_to_the_code_that_uses_them(spec):
    import_named_module(spec)
