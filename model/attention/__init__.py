"""One file per attention. A new one is a config class and a module here, and a file under conf/attention/."""
