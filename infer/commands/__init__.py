"""The programs behind `kvjax COMMAND`."""
