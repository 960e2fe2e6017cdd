"""Pipeline parallelism: a schedule is a table (`schedule.py`), one executor runs it (`executor.py`)."""
