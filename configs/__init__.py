"""The YAML files of vaeq's commands; importable as vaeq.configs, so that a wheel carries them."""
