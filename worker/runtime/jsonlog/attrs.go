package jsonlog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"text/template"
)

// MaxAttrs is the most bytes of a log's encoded attributes, which every entry repeats.
const MaxAttrs = 16 << 10

// Source is what the attributes of a container's log are taken from.
type Source struct {
	// Labels and Env ("KEY=value") are the container's own.
	Labels map[string]string
	Env    []string
	// ID is the container's full id, Name its name without slash, ImageID the full id of its
	// image with the algorithm, ImageName what it was asked for by.
	ID, Name, ImageID, ImageName string
	// DaemonName is what the "tag" template calls the daemon.
	DaemonName string
}

// Attributes returns what the log options "labels", "labels-regex", "env", "env-regex" and
// "tag" ask to have written beside each entry; nil if that is nothing. An error names
// the option.
func Attributes(options map[string]string, from Source) (map[string]string, error) {
	out := map[string]string{}
	env := map[string]string{}
	for _, pair := range from.Env {
		if key, value, ok := strings.Cut(pair, "="); ok {
			env[key] = value
		}
	}
	for _, set := range []struct {
		option string
		values map[string]string
	}{{"labels", from.Labels}, {"env", env}} {
		if err := choose(out, options, set.option, set.values); err != nil {
			return nil, err
		}
	}
	if text := options["tag"]; text != "" {
		tag, err := expandTag(text, from)
		if err != nil {
			return nil, err
		}
		if tag != "" {
			out["tag"] = tag
		}
	}
	if len(out) == 0 {
		return nil, nil //nolint:nilnil // no attributes are an answer
	}
	if n := len(appendAttrs(nil, out)); n > MaxAttrs {
		return nil, fmt.Errorf("the log options add %d bytes to every line, more than %d: name fewer labels or environment variables", n, MaxAttrs)
	}
	return out, nil
}

// choose copies the values that an option lists, by name or by regular expression.
func choose(out, options map[string]string, option string, values map[string]string) error {
	for name := range strings.SplitSeq(options[option], ",") {
		if value, ok := values[name]; ok {
			out[name] = value
		}
	}
	pattern := options[option+"-regex"]
	if pattern == "" {
		return nil
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return fmt.Errorf("log option %s-regex: %w", option, err)
	}
	for name, value := range values {
		if re.MatchString(name) {
			out[name] = value
		}
	}
	return nil
}

// tagFields is what a tag's template may ask for, by the names Docker gives them.
type tagFields struct {
	ContainerID, ContainerName, ContainerImageID, ContainerImageName, DaemonName string
	ContainerLabels                                                              map[string]string
	ContainerEnv                                                                 []string
}

// ID returns the first twelve digits of the container's id.
func (f tagFields) ID() string { return f.ContainerID[:min(12, len(f.ContainerID))] }

// FullID returns the container's id.
func (f tagFields) FullID() string { return f.ContainerID }

// Name returns the container's name.
func (f tagFields) Name() string { return strings.TrimPrefix(f.ContainerName, "/") }

// ImageID returns the first twelve digits of the image's id.
func (f tagFields) ImageID() string {
	_, digits, found := strings.Cut(f.ContainerImageID, ":")
	if !found {
		digits = f.ContainerImageID
	}
	return digits[:min(12, len(digits))]
}

// ImageFullID returns the image's id with its algorithm.
func (f tagFields) ImageFullID() string { return f.ContainerImageID }

// ImageName returns the name of the image.
func (f tagFields) ImageName() string { return f.ContainerImageName }

func expandTag(text string, from Source) (string, error) {
	t, err := template.New("tag").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return string(b), err
		},
		"split": strings.Split,
		"join":  strings.Join,
		"lower": strings.ToLower,
		"upper": strings.ToUpper,
		"pad": func(s string, before, after int) string {
			if s == "" {
				return s
			}
			return strings.Repeat(" ", max(0, min(before, MaxAttrs))) + s + strings.Repeat(" ", max(0, min(after, MaxAttrs)))
		},
		"truncate": func(s string, n int) string { return s[:max(0, min(n, len(s)))] },
	}).Option("missingkey=error").Parse(text)
	if err != nil {
		return "", fmt.Errorf("log option tag: %w", err)
	}
	var b bytes.Buffer
	if err := t.Execute(&b, tagFields{
		ContainerID: from.ID, ContainerName: "/" + from.Name, ContainerImageID: from.ImageID, ContainerImageName: from.ImageName,
		DaemonName: from.DaemonName, ContainerLabels: from.Labels, ContainerEnv: from.Env,
	}); err != nil {
		return "", fmt.Errorf("log option tag: %w", err)
	}
	return b.String(), nil
}

// appendAttrs appends the member "attrs" of an entry, with its comma in front.
func appendAttrs(b []byte, attrs map[string]string) []byte {
	if len(attrs) == 0 {
		return b
	}
	b = append(b, `,"attrs":{`...)
	for i, key := range slices.Sorted(maps.Keys(attrs)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(appendString(b, []byte(key)), ':')
		b = appendString(b, []byte(attrs[key]))
	}
	return append(b, '}')
}
