"""A model and the data of PE-RLHF's two stages."""

from material import demo_model, demo_rows

demo_model("path/to/model")
demo_rows("preferences", "preferences.jsonl")
demo_rows("prompts", "prompts.jsonl")
