"""What one party runs, in the environment that `kvjax private setup` makes.

It has numpy and SecretFlow SPU but no JAX: the folder is started by itself and imports nothing else
of kvjax. Programs come to it lowered.
"""

__all__: list[str] = []
