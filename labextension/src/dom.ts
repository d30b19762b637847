/** Elements made of names, attributes and text. Nothing here parses HTML. */

export type Child = Node | string | null | undefined | false
type Attributes = Record<string, string | number | boolean | null | undefined | EventListener>

const SVG = 'http://www.w3.org/2000/svg'

/**
 * Make an HTML element.
 *
 * `class` and other attributes are set as text; `true` is an empty attribute, `false` and `null` none;
 * a key that begins with `on` adds a listener; a key that begins with `--` sets a CSS variable.
 */
export function h(name: string, attributes: Attributes = {}, ...children: Child[]): HTMLElement {
  return fill(document.createElement(name), attributes, children)
}

/** The same for an SVG element. */
export function s(name: string, attributes: Attributes = {}, ...children: Child[]): SVGElement {
  return fill(document.createElementNS(SVG, name) as SVGElement, attributes, children)
}

/** Put these children in place of those that are there. */
export function replace(parent: Element, ...children: Child[]): void {
  parent.replaceChildren(...children.filter(isChild))
}

/** The element that has the focus in the tree of this one: in its shadow root, or in the page. */
export function activeIn(element: Node): Element | null {
  const tree = element.getRootNode()
  return tree instanceof Document || tree instanceof ShadowRoot ? tree.activeElement : null
}

/** Set the text of an element, only when it is another: assistive technology speaks of changes. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text
}

function fill<E extends HTMLElement | SVGElement>(element: E, attributes: Attributes, children: Child[]): E {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') element.addEventListener(name.slice(2), value)
    else if (name.startsWith('--')) element.style.setProperty(name, String(value))
    else if (value === true) element.setAttribute(name, '')
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, String(value))
  }
  element.append(...children.filter(isChild))
  return element
}

function isChild(child: Child): child is Node | string {
  return child !== null && child !== undefined && child !== false
}
