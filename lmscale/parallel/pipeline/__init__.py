"""Pipeline parallelism: which device does what when (`schedule`), and which layers are in which stage (`stages`)."""
