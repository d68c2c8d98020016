"""The stages, one file each; `pipelines.stage_graph` makes a recipe's graph of them."""
