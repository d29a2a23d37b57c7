package dockerapi_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var rewrite = flag.Bool("rewrite", false, "rewrite the answers in testdata")

var (
	stamps   = regexp.MustCompile(`"20\d\d-[^"]*Z"`)
	indexes  = regexp.MustCompile(`"Index":\d+`)
	machine  = regexp.MustCompile(`"(NGoroutines|NCPU|KernelVersion|GoVersion|Arch|SystemTime|OperatingSystem)": ?("[^"]*"|\d+)`)
	versions = regexp.MustCompile(`VERSION\(([^)]*)\)`)
)

// TestExchanges replays testdata/*.http against a fresh daemon. A file is a story: each
// request is a line ">> METHOD /path", followed by "> " lines with headers and then a
// body, and is followed by the expected status, headers and body. VERSION(/path) stands
// for the version of the object there. What differs from run to
// run or machine to machine is masked.
func TestExchanges(t *testing.T) {
	files, err := filepath.Glob("testdata/*.http")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			server := serve(t, newDaemon(t, false))
			got := replay(t, server.URL, string(want))
			if *rewrite {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// replay sends the requests of a story and returns it with the answers of now.
func replay(t *testing.T, url, story string) string {
	t.Helper()
	var out strings.Builder
	lines := strings.Split(strings.TrimSuffix(story, "\n"), "\n")
	for i := 0; i < len(lines); {
		line := lines[i]
		i++
		if strings.HasPrefix(line, "#") || line == "" && i < len(lines) && strings.HasPrefix(lines[i], "#") {
			fmt.Fprintln(&out, line)
			continue
		}
		request, ok := strings.CutPrefix(line, ">> ")
		if !ok {
			continue // an answer, to be replaced
		}
		fmt.Fprintln(&out, line)
		header := http.Header{}
		var body []string
		for i < len(lines) && strings.HasPrefix(lines[i], "> ") {
			fmt.Fprintln(&out, lines[i])
			text := lines[i][2:]
			if key, value, found := strings.Cut(text, ": "); found && len(body) == 0 && !strings.HasPrefix(text, "{") {
				header.Add(key, value)
			} else {
				body = append(body, text)
			}
			i++
		}
		out.WriteString(exchange(t, url, request, header, strings.Join(body, "\n")))
		out.WriteString("\n")
	}
	return out.String()
}

func exchange(t *testing.T, url, request string, header http.Header, body string) string {
	t.Helper()
	request = versions.ReplaceAllStringFunc(request, func(s string) string {
		var object struct{ Version struct{ Index uint64 } }
		resp, err := http.Get(url + versions.FindStringSubmatch(s)[1])
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&object); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(object.Version.Index)
	})
	method, path, _ := strings.Cut(request, " ")
	req, err := http.NewRequestWithContext(t.Context(), method, url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	if body != "" && header.Get("Content-Type") == "" {
		header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "%d %s\n", resp.StatusCode, resp.Header.Get("Content-Type"))
	for _, key := range []string{"Swarm", "Api-Version"} {
		if v := resp.Header.Get(key); v != "" && strings.HasSuffix(path, "_ping") {
			fmt.Fprintf(&out, "%s: %s\n", key, v)
		}
	}
	data = machine.ReplaceAll(data, []byte(`"$1":"MACHINE"`))
	data = indexes.ReplaceAll(stamps.ReplaceAll(data, []byte(`"TIME"`)), []byte(`"Index":N`))
	if bytes.IndexByte(data, 0) >= 0 {
		fmt.Fprintf(&out, "%q\n", data)
		return out.String()
	}
	var pretty bytes.Buffer
	if json.Indent(&pretty, data, "", "  ") == nil && len(data) > 200 {
		data = pretty.Bytes()
	}
	out.Write(bytes.TrimRight(data, "\n"))
	if len(data) > 0 {
		out.WriteByte('\n')
	}
	return out.String()
}
