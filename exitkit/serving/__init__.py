"""Beyond one process: requests of many clients, and data sets larger than a machine. Needs the extra ``exitkit[serve]``."""
