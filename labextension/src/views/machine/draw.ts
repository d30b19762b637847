/** The machine picture as SVG: what `machine_layout.ts` placed, with its words. */

import { s } from '../../dom'
import type { Translate } from '../../i18n'
import type { DeviceState, MachineState } from '../../wire'
import { type Card, type Inner, PAD, type Place } from './cards'
import { deviceLines, flopsWords, freeWords, kindWords, linkLine, memoryWords, readWords, roomWords, totalWords } from './facts'
import { LINE, type Label, stepLabel, type StepLabel } from './labels'
import type { Picture, Point, Way } from './layout'
import { pair } from './links'
import { isOwn, type Path, type Step } from './path'
import { cut, textWidth } from './type'

const CORNER = 7
/** How much wider bold letters are. */
const BOLD = 1.12
/** Pixels of a letter of an id. */
const MONO = 8.5
const BAR = 12
/** Slower than this is drawn as thin as this, in bytes per second. */
const THIN = 4e8

/** What all parts of the picture need to know. */
export interface Scene {
  state: MachineState
  path: Path
  t: Translate
  /** Tell a thing apart in this document: patterns have ids. */
  id: string
}

/** Lines that a tooltip says, by the key of the thing that is pointed at. */
export type Told = Map<string, string[]>

export function draw(picture: Picture, scene: Scene): { svg: SVGElement; told: Told } {
  const { lane, width, height, cards, ways } = picture
  const told: Told = new Map()
  const svg = s('svg', {
    class: 'mv-svg', viewBox: `${-lane} 0 ${lane + width} ${height}`, width: lane + width, height, role: 'group',
    'aria-label': scene.t('machinePicture', { name: scene.state.name }),
  })
  svg.append(patterns(scene.id))
  for (const card of cards) svg.append(drawCard(card, scene, told))
  for (const way of ways) svg.append(drawWay(way, scene, told))
  return { svg, told }
}

/** Logarithmic: 0.5 GB/s is a thread, 3 TB/s is a rope. */
export function strokeWidth(bytesPerS: number): number {
  const decades = Math.log10(Math.max(bytesPerS, THIN) / THIN)
  return Number(Math.min(11, 1.6 + 2.3 * decades).toFixed(1))
}

function patterns(id: string): SVGElement {
  const line = s('path', { d: 'M-2 2 l4 -4 M0 6 l6 -6 M4 8 l4 -4', class: 'mv-hatch' })
  return s('defs', {}, s('pattern', { id: `${id}-other`, width: 6, height: 6, patternUnits: 'userSpaceOnUse' }, line))
}

/** A group that can be pointed at, by mouse or by key, and says what it is. */
function thing(key: string, name: string, lines: string[], told: Told, children: SVGElement[]): SVGElement {
  told.set(key, lines)
  return s('g', { class: `mv-thing ${name}`, tabindex: 0, role: 'img', 'aria-label': lines.join('. '), 'data-key': key }, ...children)
}

// --- Cards

function drawCard(card: Card, scene: Scene, told: Told): SVGElement {
  const key = card.devices.map(device => device.id).join('+')
  const lines = card.devices.flatMap(device => deviceLines(device, scene.t))
  const outline = s('rect', { class: 'mv-card', x: card.x, y: card.y, width: card.width, height: card.height, rx: 9 })
  return thing(key, `kind-${card.kind}`, lines, told, [
    outline,
    ...(card.kind === 'npu' ? strip(card, scene) : title(card, scene)),
    ...card.inners.map(inner => drawInner(inner, scene)),
    ...card.dies.map(die => drawDie(die, card, scene)),
    ...(card.memory ? [drawMemory(card.memory, card, scene)] : []),
  ])
}

/** `cuda:0 GPU`, and the name below it, or beside it on a flat card. */
function title(card: Card, scene: Scene): SVGElement[] {
  const device = card.devices[0]
  if (!device) return []
  if (card.kind === 'unified') {
    const names = card.devices.map(one => one.name).join(' · ')
    return [
      text(card.x + PAD, card.y + 18, names, 'mv-strong', card.width - 2 * PAD),
      text(card.x + PAD, card.y + 34, scene.t('machineShared'), 'mv-muted', card.width - 2 * PAD),
    ]
  }
  const kind = card.kind === 'disk' && device.id === 'disk' ? '' : kindWords(device, scene.t)
  const isFlat = card.kind !== 'gpu'
  const idWidth = device.id.length * MONO + 8
  const kindWidth = kind ? textWidth(kind) + 10 : 0
  const nameX = isFlat ? card.x + PAD + idWidth + kindWidth : card.x + PAD
  return [
    text(card.x + PAD, card.y + 19, device.id, 'mv-id'),
    ...(kind ? [text(card.x + PAD + idWidth, card.y + 19, kind, 'mv-muted')] : []),
    text(nameX, card.y + (isFlat ? 19 : 35), device.name, '', card.x + card.width - PAD - nameX),
  ]
}

function strip(card: Card, scene: Scene): SVGElement[] {
  const device = card.devices[0]
  if (!device) return []
  const only = scene.t('machineNamedOnly')
  const room = card.width - 2 * PAD - textWidth(only) - 8
  return [
    text(card.x + PAD, card.y + 21, `${device.id}  ${device.name}`, '', room),
    text(card.x + card.width - PAD, card.y + 21, only, 'mv-muted mv-end'),
  ]
}

/** A processor: what it is and how fast it computes; a hollow one where nothing computes. */
function drawDie(die: Place, card: Card, scene: Scene): SVGElement {
  const { device } = die
  const isNamedOnly = device.kind === 'npu'
  const speed = isNamedOnly ? scene.t('machineNamedOnly') : flopsWords(device)
  const name = card.kind === 'unified' ? device.id : kindWords(device, scene.t)
  const isTall = die.height > 40 || textWidth(name) + textWidth(speed) * BOLD + 28 > die.width
  const [x, middle] = [die.x + die.width / 2, die.y + die.height / 2]
  const words = isTall
    ? [text(x, middle - 3, name, 'mv-on-die mv-mid mv-small'), text(x, middle + 11, speed, 'mv-on-die mv-mid mv-strong', die.width - 8)]
    : [text(die.x + 10, middle + 4, name, 'mv-on-die mv-small'), text(die.x + die.width - 10, middle + 4, speed, 'mv-on-die mv-end mv-strong')]
  return s('g', { class: `mv-die tier-${device.kind}${isNamedOnly ? ' hollow' : ''}` },
    s('path', { class: 'mv-pins', d: pins(die) }),
    s('rect', { x: die.x, y: die.y, width: die.width, height: die.height, rx: 4 }), ...words)
}

function pins(die: Place): string {
  const found: string[] = []
  for (let x = die.x + 9; x < die.x + die.width - 5; x += 9) found.push(`M${x} ${die.y - 3}v${die.height + 6}`)
  return found.join('')
}

/** A memory: its name, a bar of what is used, by others, and free, and the words for it. */
function drawMemory(memory: Place, card: Card, scene: Scene): SVGElement {
  const { device } = memory
  const [x, width] = [memory.x + 9, memory.width - 18]
  const name = memoryWords(device, scene.state, scene.t)
  const [free, aside] = memoryFacts(memory, card, width, scene)
  const room = width - textWidth(name) * BOLD - 8
  return s('g', { class: `mv-memory tier-${device.kind}` },
    s('rect', { class: 'mv-box', x: memory.x, y: memory.y, width: memory.width, height: memory.height, rx: 5 }),
    text(x, memory.y + 16, name, 'mv-small mv-strong'),
    ...(aside && textWidth(aside) <= room ? [text(x + width, memory.y + 16, aside, 'mv-muted mv-end')] : []),
    ...bar(device, x, memory.y + 22, width, scene.id),
    text(x, memory.y + 51, free, 'mv-num', width))
}

/** What is free, and what stands beside the name; on a small card they share `free of total`. */
function memoryFacts({ device }: Place, card: Card, width: number, scene: Scene): [string, string] {
  const words = roomWords(device, scene.t)
  if (device.total && textWidth(words) > width) return [scene.t('machineFreeOnly', { free: freeWords(device) }), totalWords(device)]
  const reads = card.kind === 'disk' ? readWords(device) : ''
  return [words, reads ? scene.t('machineReads', { speed: reads }) : limitWords(card, scene)]
}

/** A GPU that shares the memory may use a part of it. */
function limitWords(card: Card, scene: Scene): string {
  const gpu = card.kind === 'unified' ? card.devices.find(device => device.kind === 'gpu' && device.total) : undefined
  return gpu ? scene.t('machineGpuLimit', { device: gpu.id, size: totalWords(gpu) }) : ''
}

function bar(device: DeviceState, x: number, y: number, width: number, id: string): SVGElement[] {
  if (!device.total) return []
  const share = (bytes: number) => (width * Math.min(device.total, Math.max(0, bytes))) / device.total
  const used = share(device.total - device.free)
  const other = Math.min(used, share(device.other))
  const part = (name: string, from: number, size: number, fill = '') =>
    s('rect', { class: name, x: x + from, y, width: Math.max(0, size), height: BAR, rx: size > 6 ? 2 : 0, ...(fill ? { fill } : {}) })
  return [
    part('mv-free', 0, width),
    ...(used > other ? [part('mv-used', 0, used - other)] : []),
    ...(other ? [part('mv-other', used - other, other, `url(#${id}-other)`)] : []),
  ]
}

/** From the memory into the processor: as thick as it is fast, with what it reads for one token. */
function drawInner(inner: Inner, scene: Scene): SVGElement {
  const { device, from, to, words } = inner
  const steps = scene.path.steps.filter(step => step.target === device.id && (isOwn(step) || !isLinked(step, scene.state)))
  const step = stepLabel(steps, scene.path, scene.t)
  const speed = readWords(device)
  const lines = inner.isUpright ? [speed] : [cut(speed, words.room)]
  return s('g', { class: 'mv-inner' },
    s('path', { class: 'mv-line', d: pathData([from, to]), 'stroke-width': strokeWidth(device.read_bytes_per_s) }),
    ...(steps[0] ? [flow([from, to], steps, scene.path)] : []),
    ...(inner.isUpright ? besideWords(words, lines, step) : aroundWords(words, lines, step)))
}

function isLinked(step: Step, state: MachineState): boolean {
  return state.links.some(link => link.source === step.source && link.target === step.target)
}

function besideWords({ x, y, room }: Inner['words'], lines: string[], step: StepLabel | null): SVGElement[] {
  const label: Label = { x, y: y - (LINE * (step ? 2 : 1)) / 2, anchor: 'start', lines, step }
  const isTight = step !== null && pillWidth(step.numbers) + 5 + textWidth(step.words) * BOLD > room
  return [s('g', { class: isTight ? 'mv-tight' : '' }, ...labelElements(label))]
}

/** Over and under a flat line: the step's bytes and seconds in two lines, for there is little room. */
function aroundWords({ x, y }: Inner['words'], lines: string[], step: StepLabel | null): SVGElement[] {
  const above = lines.map(line => text(x, y - 12, line, 'mv-num mv-mid'))
  if (!step) return above
  const name = `mv-step${step.isLimiting ? ' limiting' : ''}`
  const parts = step.words.split(' · ')
  return [
    ...above,
    s('g', { class: name }, pill(x, y, step.numbers), ...parts.map((part, i) => text(x, y + 22 + 14 * i, part, 'mv-num mv-mid'))),
  ]
}

// --- Ways

function drawWay(way: Way, scene: Scene, told: Told): SVGElement {
  const { state, path, t } = scene
  const speed = Math.max(...way.links.map(link => link.bytes_per_s))
  const lines = way.links.slice(0, 4).map(link => linkLine(link, state, t))
  if (way.links.length > 4) lines.push(`… ${way.links.length}`)
  const name = `way${way.links.some(link => link.assumed) ? ' assumed' : ''}`
  const steps = path.steps.filter(step => way.links.some(link => link.source === step.source && link.target === step.target))
  return thing(way.key, name, [...lines, ...steps.map(step => stepWords(step, scene))], told, [
    ...way.lines.map(line => s('path', { class: 'mv-line', d: pathData(line.points), 'stroke-width': strokeWidth(speed) })),
    ...way.lines.map(line => s('path', { class: 'mv-near', d: pathData(line.points) })),
    // Where ways lie over each other the one that sets the pace is seen.
    ...[...steps].sort((one, other) => one.seconds - other.seconds).flatMap(step => flows(step, way, path)),
    ...labelElements(way.label),
  ])
}

/** `disk → RAM 6.4 GiB per token, 1.3 s` for a step. */
function stepWords(step: Step, { path, t }: Scene): string {
  const label = stepLabel([step], path, t)
  return label ? `${label.numbers}: ${label.words}` : ''
}

function flows(step: Step, way: Way, path: Path): SVGElement[] {
  const here = way.lines.filter(line => pair(line) === pair(step))
  return here.map(line => flow(line.source === step.source ? line.points : [...line.points].reverse(), [step], path))
}

/** Bytes on their way: a lit line, dots that run along it, and an arrow where they arrive. */
function flow(points: Point[], steps: Step[], path: Path): SVGElement {
  const seconds = Math.max(...steps.map(step => step.seconds))
  const share = path.seconds ? seconds / path.seconds : 0.5
  const isLimiting = steps.some(step => path.limiting.includes(step))
  const d = pathData(points)
  return s('g', { class: `mv-flow${isLimiting ? ' limiting' : ''}`, '--pace': `${(0.5 + 1.5 * Math.min(1, share)).toFixed(2)}s` },
    s('path', { class: 'mv-lit', d }), s('path', { class: 'mv-dots', d }), s('path', { class: 'mv-arrow', d: arrow(points) }))
}

function arrow(points: Point[]): string {
  const [x, y] = points.at(-1) ?? [0, 0]
  const [fromX, fromY] = points.at(-2) ?? [x, y + 1]
  const length = Math.hypot(x - fromX, y - fromY) || 1
  const [dx, dy] = [(x - fromX) / length, (y - fromY) / length]
  const back = (along: number, aside: number) => `${(x - dx * along - dy * aside).toFixed(1)} ${(y - dy * along + dx * aside).toFixed(1)}`
  return `M${back(0, 0)}L${back(10, 6)}L${back(10, -6)}Z`
}

/** A line through the points, its corners round. */
export function pathData(points: Point[]): string {
  const parts = points.map((point, i) => {
    const [before, after] = [points[i - 1], points[i + 1]]
    if (!before || !after) return `${i ? 'L' : 'M'}${point.join(' ')}`
    return `L${towards(point, before).join(' ')}Q${point.join(' ')} ${towards(point, after).join(' ')}`
  })
  return parts.join('')
}

function towards([x, y]: Point, [otherX, otherY]: Point): Point {
  const length = Math.hypot(otherX - x, otherY - y) || 1
  const step = Math.min(CORNER, length / 2)
  return [x + ((otherX - x) * step) / length, y + ((otherY - y) * step) / length]
}

// --- Words

function labelElements(label: Label): SVGElement[] {
  const isMiddle = label.anchor === 'middle'
  const lines = label.lines.map((line, i) => text(label.x, label.y + 13 + LINE * i, line, `mv-num mv-halo${isMiddle ? ' mv-mid' : ''}`))
  return label.step ? [...lines, stepElement(label, label.step)] : lines
}

function stepElement(label: Label, step: StepLabel): SVGElement {
  const y = label.y + 9 + LINE * label.lines.length
  const width = pillWidth(step.numbers)
  const left = label.anchor === 'middle' ? label.x - (width + textWidth(step.words)) / 2 : label.x
  return s('g', { class: `mv-step${step.isLimiting ? ' limiting' : ''}` },
    pill(left + width / 2, y, step.numbers), text(left + width + 5, y + 4, step.words, 'mv-num mv-halo'))
}

function pillWidth(numbers: string): number {
  return Math.max(16, textWidth(numbers, 11) + 9)
}

function pill(x: number, y: number, numbers: string): SVGElement {
  const width = pillWidth(numbers)
  return s('g', { class: 'mv-pill' },
    s('rect', { x: x - width / 2, y: y - 8, width, height: 16, rx: 8 }), text(x, y + 4, numbers, 'mv-mid'))
}

/** Words at a place; cut where there is less room than they need. */
function text(x: number, y: number, words: string, name = '', room = Infinity): SVGElement {
  return s('text', { x: x.toFixed(1), y: y.toFixed(1), class: name }, cut(words, room, name.includes('mv-id') ? 14 : 12))
}
