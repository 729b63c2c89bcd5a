// Renders the chart as Helm does, with the same template engine and functions, from Debian's packages: Helm itself is
// not in Debian. What the chart does not use is not here.
//
//	render CHART NAMESPACE [VALUES...]
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"text/template"

	"github.com/Masterminds/sprig"
	"github.com/ghodss/yaml"
)

func main() {
	if len(os.Args) < 3 {
		fail(fmt.Errorf("render CHART NAMESPACE [VALUES...]"))
	}
	chart, namespace := os.Args[1], os.Args[2]
	values := map[string]interface{}{}
	for _, file := range append([]string{filepath.Join(chart, "values.yaml")}, os.Args[3:]...) {
		merge(values, read(file))
	}
	about := map[string]interface{}{}
	for key, value := range read(filepath.Join(chart, "Chart.yaml")) {
		about[strings.ToUpper(key[:1])+key[1:]] = value
	}
	data := map[string]interface{}{
		"Values":  values,
		"Chart":   about,
		"Release": map[string]interface{}{"Name": "egret", "Namespace": namespace, "Service": "Helm"},
	}

	templates := template.New("chart")
	functions := sprig.TxtFuncMap()
	functions["include"] = func(name string, data interface{}) (string, error) {
		var text strings.Builder
		err := templates.ExecuteTemplate(&text, name, data)
		return text.String(), err
	}
	functions["toYaml"] = func(value interface{}) (string, error) {
		text, err := yaml.Marshal(value)
		return strings.TrimSuffix(string(text), "\n"), err
	}
	// `helm lint --strict` and this fail where a template names a value that is not there.
	templates.Funcs(functions).Option("missingkey=error")

	files, err := filepath.Glob(filepath.Join(chart, "templates", "*"))
	fail(err)
	sort.Strings(files)
	for _, file := range files {
		text, err := os.ReadFile(file)
		fail(err)
		_, err = templates.New(filepath.Base(file)).Parse(string(text))
		fail(err)
	}
	for _, file := range files {
		if filepath.Ext(file) != ".yaml" {
			continue
		}
		fmt.Printf("---\n# %s\n", filepath.Base(file))
		fail(templates.ExecuteTemplate(os.Stdout, filepath.Base(file), data))
		fmt.Println()
	}
}

func read(file string) map[string]interface{} {
	text, err := os.ReadFile(file)
	fail(err)
	values := map[string]interface{}{}
	if err := yaml.Unmarshal(text, &values); err != nil {
		fail(fmt.Errorf("%s: %w", file, err))
	}
	return values
}

// As Helm: maps are merged, null takes a value away, everything else is replaced.
func merge(into, from map[string]interface{}) {
	for key, value := range from {
		old, isMap := into[key].(map[string]interface{})
		if new, ok := value.(map[string]interface{}); ok && isMap {
			merge(old, new)
		} else if value == nil {
			delete(into, key)
		} else {
			into[key] = value
		}
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}
