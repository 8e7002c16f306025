"""Attention variants, one file each. A new one is a config class and a module here, and a file in conf/attention/."""
