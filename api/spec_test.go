package api_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/skep-dev/skep/api/skepv1"
)

const swarmkit = "docker.swarmkit.v1"

// TestSpecification holds every message, field, enum value, method and role of SwarmKit's
// package to the specification's list, which was not made from our .proto files.
func TestSpecification(t *testing.T) {
	text, err := os.ReadFile("testdata/swarmkit.txt")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	var service string
	rpc := regexp.MustCompile(`^rpc (\w+) \((stream )?(\w+)\) returns \((stream )?(\w+)\) for (.+)$`)
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch kind, rest, _ := strings.Cut(line, " "); kind {
		case "#", "":
		case "service":
			service = rest
		case "rpc":
			m := rpc.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("cannot read %q", line)
			}
			want = append(want,
				fmt.Sprintf("method /%s.%s/%s %s%s.%s -> %s%s.%s", swarmkit, service, m[1], m[2], swarmkit, m[3], m[4], swarmkit, m[5]),
				fmt.Sprintf("access %s.%s.%s %s", swarmkit, service, m[1], sorted(m[6])))
		case "enum":
			name, values := body(t, rest)
			for v := range strings.SplitSeq(values, ", ") {
				value, number, _ := strings.Cut(v, "=")
				want = append(want, fmt.Sprintf("enum %s.%s %s = %s", swarmkit, name, value, number))
			}
		default:
			name, fields := body(t, line)
			want = append(want, "message "+swarmkit+"."+name)
			want = append(want, fieldLines(t, name, fields)...)
		}
	}
	var got []string
	for _, line := range append(wireLines(), accessLines()...) {
		if word := strings.Fields(line)[1]; strings.HasPrefix(strings.TrimPrefix(word, "/"), swarmkit+".") {
			got = append(got, line)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the .proto files differ from the specification (-specification +ours):\n%s", diff)
	}
	if len(want) < 1200 {
		t.Errorf("only %d facts were read", len(want))
	}
}

// body splits "Name { … } (remark)".
func body(t *testing.T, line string) (name, inner string) {
	t.Helper()
	name, rest, ok := strings.Cut(line, " {")
	end := strings.LastIndex(rest, "}")
	if !ok || end < 0 {
		t.Fatalf("cannot read %q", line)
	}
	return name, strings.TrimSpace(rest[:end])
}

// fieldLines reads the fields of a message in the specification's notation, and writes
// them as wireLines does.
func fieldLines(t *testing.T, message, fields string) []string {
	t.Helper()
	var out []string
	oneof := regexp.MustCompile(`oneof (\w+) \{ ([^}]*) \}`)
	for _, m := range oneof.FindAllStringSubmatch(fields, -1) {
		for f := range strings.SplitSeq(m[2], " | ") {
			out = append(out, specField(t, message, f)+" oneof "+m[1])
		}
	}
	// What is left once the oneofs are out; commas within map<…> do not part fields.
	rest := regexp.MustCompile(`map<(\w+),([\w.]+)>`).ReplaceAllString(oneof.ReplaceAllString(fields, ""), "map<$1;$2>")
	for f := range strings.SplitSeq(rest, ", ") {
		if f = strings.Trim(f, ", "); f != "" {
			out = append(out, specField(t, message, strings.ReplaceAll(f, ";", ",")))
		}
	}
	return out
}

func specField(t *testing.T, message, text string) string {
	t.Helper()
	m := regexp.MustCompile(`^(\w+)=(\d+):(repeated )?([\w.]+|map<\w+,[\w.]+>)((?: \([^)]*\))*)$`).FindStringSubmatch(strings.TrimSpace(text))
	if m == nil {
		t.Fatalf("%s: cannot read field %q", message, text)
	}
	line := fmt.Sprintf("field %s.%s %s %s %s", swarmkit, message, m[2], m[1], m[3])
	if inner, ok := strings.CutPrefix(m[4], "map<"); ok {
		key, value, _ := strings.Cut(strings.TrimSuffix(inner, ">"), ",")
		return line + "map<" + key + "," + resolve(message, value) + ">"
	}
	line += resolve(message, m[4])
	if strings.Contains(m[5], "UNPACKED") {
		line += " unpacked"
	}
	return line
}

// resolve finds a type inside the message first, then in the package; names of other
// packages and of scalars stand for themselves.
func resolve(message, name string) string {
	for _, scope := range []string{swarmkit + "." + message + ".", swarmkit + "."} {
		if _, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(scope + name)); err == nil {
			return scope + name
		}
	}
	return name
}

// accessLines says of every method who may call it.
func accessLines() []string {
	var lines []string
	forEachFile(func(f protoreflect.FileDescriptor) {
		for i := range f.Services().Len() {
			methods := f.Services().Get(i).Methods()
			for j := range methods.Len() {
				rule, _ := proto.GetExtension(methods.Get(j).Options(), skepv1.E_Access).(*skepv1.Access)
				who := strings.Join(rule.GetRoles(), " ")
				if rule.GetAnyone() {
					who += "anyone"
				}
				lines = append(lines, fmt.Sprintf("access %s %s", methods.Get(j).FullName(), sorted(who)))
			}
		}
	})
	return lines
}

func sorted(words string) string {
	return strings.Join(slices.Sorted(slices.Values(strings.Fields(words))), " ")
}

// TestUnknownFieldsSurvive decodes, edits and encodes every message of both packages with
// a field that only a newer version knows: it must still be there, at any depth.
func TestUnknownFieldsSurvive(t *testing.T) {
	newer := protowire.AppendTag(nil, 100_000, protowire.BytesType)
	newer = protowire.AppendString(newer, "from a newer version")
	count := 0
	var visit func(protoreflect.MessageDescriptors)
	visit = func(list protoreflect.MessageDescriptors) {
		for i := range list.Len() {
			d := list.Get(i)
			if d.IsMapEntry() {
				continue
			}
			count++
			message, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
			if err != nil {
				t.Fatal(err)
			}
			m := message.New()
			inner := 0
			for j := range d.Fields().Len() {
				if f := d.Fields().Get(j); f.Message() != nil && !f.IsList() && !f.IsMap() && f.ContainingOneof() == nil {
					m.Mutable(f).Message().SetUnknown(newer)
					inner++
				}
			}
			m.SetUnknown(newer)
			wire, err := proto.Marshal(m.Interface())
			if err != nil {
				t.Fatal(err)
			}
			read := message.New()
			if err := proto.Unmarshal(wire, read.Interface()); err != nil {
				t.Fatal(err)
			}
			edit(read)
			again, err := proto.Marshal(proto.Clone(read.Interface()))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Count(string(again), "from a newer version"); got != inner+1 {
				t.Errorf("%s: %d of %d unknown fields survive an edit", d.FullName(), got, inner+1)
			}
			visit(d.Messages())
		}
	}
	forEachFile(func(f protoreflect.FileDescriptor) { visit(f.Messages()) })
	if count < 250 {
		t.Errorf("only %d messages were tried", count)
	}
}

// edit sets the first singular string or number.
func edit(m protoreflect.Message) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		if f.IsList() || f.IsMap() || f.ContainingOneof() != nil {
			continue
		}
		if f.Kind() == protoreflect.StringKind {
			m.Set(f, protoreflect.ValueOfString("edited"))
			return
		}
		if f.Kind() == protoreflect.Uint64Kind {
			m.Set(f, protoreflect.ValueOfUint64(7))
			return
		}
	}
}
