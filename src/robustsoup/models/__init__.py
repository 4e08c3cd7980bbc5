"""Networks, by name or by "package.module:factory"."""

from robustsoup.models.sources import MODELS, code_mark, load_model, normalized

__all__ = ["MODELS", "code_mark", "load_model", "normalized"]
