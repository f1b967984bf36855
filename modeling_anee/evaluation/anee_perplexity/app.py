"""A page for the metric in a Space: `python app.py`, with gradio installed."""

from pathlib import Path

import evaluate
import gradio


metric = evaluate.load(str(Path(__file__).with_name("anee_perplexity.py")), module_type="metric")


def compute(texts: str, model_id: str, budgets: str) -> dict:
    """Score one text a line."""
    try:
        listed = [float(budget) for budget in budgets.split(",")]
        predictions = [line for line in texts.splitlines() if line.strip()]
        return metric.compute(predictions=predictions, model_id=model_id.strip(), energy_budget=listed)
    except (ValueError, OSError) as error:
        raise gradio.Error(str(error)) from error


page = gradio.Interface(
    fn=compute,
    inputs=[
        gradio.Textbox(label="Texts, one a line", lines=6),
        gradio.Textbox(label="Model: the Hub name of an artifact, or of a plain causal LM (only at budget 1.0)"),
        gradio.Textbox(label="Energy budgets", value="1.0, 0.8, 0.6"),
    ],
    outputs=gradio.JSON(label="Perplexity and cost at each budget"),
    title="anee_perplexity",
    description=metric.info.description,
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
