"""Fast operations on local arrays: no parameters, no mesh. One name per operation, behind it its implementations."""
