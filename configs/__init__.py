"""Experiments: one short file each, read by name (`kvjax train lm --config lm_tiny`)."""
