"""What a run is asked to do: the recipe tree, its YAML layers and its checks."""
