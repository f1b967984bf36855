r"""Write the card of an artifact and put its pictures beside it: the verb `anee card`, as a script.

    python hub_scripts/make_model_card.py ARTIFACT --recipe RECIPE.yaml --figures rows.json --budget-figures scores.json \
        --curve curve.png --heatmap map.png --repository USER/REPO --base-license apache-2.0

Figures come from the JSON files of `anee compare`, `anee perplexity` and `anee samples`, and from nowhere else.
Needs the package with its extra `train`.
"""

import typer

from modeling_anee.cli.guard import guarded
from modeling_anee.cli.making import card


if __name__ == "__main__":
    typer.run(guarded(card))
