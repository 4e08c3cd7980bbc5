"""Networks, by name or by "package.module:factory"."""

from robustsoup.models.loading import MODELS, load_model, normalized

__all__ = ["MODELS", "load_model", "normalized"]
