package containerd

import (
	"strconv"

	"github.com/moby/moby/api/types/container"

	"github.com/skep-dev/skep/core/model"
	"github.com/skep-dev/skep/worker/runtime/jsonlog"
)

// logOptions reads the options of the json-file driver, which is also what "local" and
// no name at all mean. What they say of attributes is left to jsonlog.Attributes.
func logOptions(l container.LogConfig) (jsonlog.Config, error) {
	cfg := jsonlog.Config{MaxSize: jsonlog.DefaultMaxSize, MaxFiles: jsonlog.DefaultMaxFiles}
	driver := l.Type
	switch driver {
	case "":
		driver = "json-file"
	case "json-file", "local":
	case "none":
		return cfg, nil
	default:
		return cfg, model.Errorf(model.Invalid, "logger: no log driver named '%s' is registered", l.Type)
	}
	for key, value := range l.Config {
		var err error
		switch key {
		case "max-size":
			if cfg.MaxSize, err = parseSize(value); err != nil {
				return cfg, model.Errorf(model.Invalid, "invalid value for max-size: %s", value)
			}
		case "max-file":
			if cfg.MaxFiles, err = strconv.Atoi(value); err != nil || cfg.MaxFiles < 1 {
				return cfg, model.Errorf(model.Invalid, "max-file cannot be less than 1")
			}
		case "compress", "mode", "max-buffer-size":
			if err := plainLog(key, value); err != nil {
				return cfg, err
			}
		case "labels", "labels-regex", "env", "env-regex", "tag":
			if driver == "local" {
				return cfg, model.Errorf(model.Invalid, "unknown log opt '%s' for log driver local", key)
			}
		default:
			return cfg, model.Errorf(model.Invalid, "unknown log opt '%s' for %s log driver", key, driver)
		}
	}
	if driver == "local" {
		return cfg, nil
	}
	// A pattern or template that cannot work is refused now, not at the start.
	_, err := jsonlog.Attributes(l.Config, jsonlog.Source{})
	if err != nil {
		return cfg, model.Wrap(model.Invalid, err, "read log options")
	}
	return cfg, nil
}

// plainLog refuses the ways of logging that Skep does not have.
func plainLog(key, value string) error {
	switch {
	case key == "compress":
		on, err := strconv.ParseBool(value)
		if err != nil {
			return model.Errorf(model.Invalid, "invalid value for compress: %s", value)
		}
		if !on {
			return nil
		}
	case key == "mode" && (value == "" || value == "blocking"):
		return nil
	case key == "mode" && value != "non-blocking":
		return model.Errorf(model.Invalid, "logger: logging mode not supported: %s", value)
	}
	return model.Errorf(model.Unimplemented, "log opt %s=%s is not implemented by skep", key, value)
}
