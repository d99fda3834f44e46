"""The typed recipe: one YAML file names data, model, training, evaluation; unknown keys are errors.

`schema` holds the fields and defaults, `reading` turns YAML and `--set` into a `Recipe`, `bundled` finds ready recipes, `presets` names models.
"""

from formary.recipe.reading import read, to_yaml
from formary.recipe.schema import Recipe

__all__ = ["Recipe", "read", "to_yaml"]
